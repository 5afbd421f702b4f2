"""DDIM with eta: the transition of epsilon-, v- and sample-prediction models (DDPO, arXiv 2305.13301)."""

from torch import Tensor


def ddim(
    x: Tensor,
    prediction: Tensor,
    alpha_bar: Tensor,
    alpha_bar_next: Tensor,
    *,
    noise_level: float,
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    """DDIM's step (arXiv 2010.02502, eq. 12 and 16), eta = `noise_level`.

        std  = eta sqrt( (1 - a') / (1 - a) (1 - a / a') )
        mean = sqrt(a') x0^ + sqrt(1 - a' - std^2) e^

    where a is the cumulative alpha. From epsilon: x0^ = (x - sqrt(1 - a) e) / sqrt(a). From v:
    x0^ = sqrt(a) x - sqrt(1 - a) v, e^ = sqrt(a) v + sqrt(1 - a) x, which also holds at a = 0 (zero terminal SNR).

    Args:
        x: current state, fp32.
        prediction: the model's output, shape of `x`.
        alpha_bar: scalar in [0, 1].
        alpha_bar_next: scalar in [0, 1], alpha_bar < alpha_bar_next.
        noise_level: eta; 1 is ancestral sampling, 0 the deterministic step.
        prediction_type: "epsilon", "v_prediction" or "sample".

    Returns:
        (mean, std): shape of `x`, and a scalar.
    """
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        eps = prediction
        x0 = (x - noise * eps) / signal
    elif prediction_type == "v_prediction":
        x0 = signal * x - noise * prediction
        eps = signal * prediction + noise * x
    elif prediction_type == "sample":
        x0 = prediction
        eps = (x - signal * x0) / noise
    else:
        raise ValueError(
            f"prediction_type {prediction_type!r} is not one of 'epsilon', 'v_prediction', 'sample'; "
            "check the scheduler's config."
        )
    std = noise_level * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).clamp(min=0).sqrt()
    return alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next - std**2).clamp(min=0).sqrt() * eps, std
