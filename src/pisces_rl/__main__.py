"""`python -m pisces_rl`, and `accelerate launch -m pisces_rl`: the program `pisces-rl`."""

from .command import main

if __name__ == "__main__":
    main()
