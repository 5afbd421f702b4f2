from pisces_rl.ot.costs import cosine_cost, squared_cost
from pisces_rl.ot.divergence import BankDivergence
from pisces_rl.ot.partial import dummy_point_transport_plan, partial_transport_plan, pisces_plan
from pisces_rl.ot.plans import ConvergenceWarning, TransportPlan, transport_cost, transport_plan

__all__ = [
    "BankDivergence",
    "ConvergenceWarning",
    "TransportPlan",
    "cosine_cost",
    "dummy_point_transport_plan",
    "partial_transport_plan",
    "pisces_plan",
    "squared_cost",
    "transport_cost",
    "transport_plan",
]
