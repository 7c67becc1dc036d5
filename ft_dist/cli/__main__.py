"""`python -m ft_dist.cli`, the same as `ft-dist`."""

from ft_dist.cli.app import main

if __name__ == "__main__":
    main()
