"""Console scripts: `router-service` and `router-admin`."""
