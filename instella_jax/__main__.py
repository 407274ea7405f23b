"""`python -m instella_jax` is the console command `instella-jax`."""

from instella_jax.cli import main

if __name__ == "__main__":
    main()
