"""Run the `pisces-rl` program as `python -m pisces_rl` or `accelerate launch -m pisces_rl`."""

from .command import main

if __name__ == "__main__":
    main()
