"""`python -m headway.placement` is one engine's process; started by the door, not by hand."""

from headway.placement import collector

if __name__ == "__main__":
    collector.rest()

    from headway.placement.process import main

    main()
