"""`python -m router_service` is `router-service`."""

from router_service.cli.serve import main

if __name__ == "__main__":
    main()
