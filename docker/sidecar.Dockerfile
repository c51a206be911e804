# The routing sidecar, without torch. From the root of the repository:
#   docker build -f docker/sidecar.Dockerfile -t knnmoe/sidecar:0.1.0 .
FROM python:3.11-slim-trixie AS build
WORKDIR /src
COPY pyproject.toml constraints.txt docker/requirements.py docker/slim.sh ./
# Where packages come from, as pip has it; given or not: README.md.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
RUN pip install --no-cache-dir --constraint constraints.txt hatchling \
    && python -m venv --without-pip /opt/knnmoe \
    && python requirements.py > requirements.txt \
    && pip --python /opt/knnmoe/bin/python install --no-cache-dir --constraint constraints.txt --requirement requirements.txt \
    && sh slim.sh /opt/knnmoe
COPY README.md LICENSE ./
COPY protos protos
COPY router_service router_service
# Without model_runner/ its console script has nothing to start.
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/knnmoe/bin/python install --no-cache-dir --no-deps /wheels/*.whl \
    && rm /opt/knnmoe/bin/model-runner

FROM python:3.11-slim-trixie
LABEL org.opencontainers.image.title="kNN-MoE routing sidecar" \
    org.opencontainers.image.licenses="Apache-2.0"
# The runner's image has the same user: a Unix socket lets its owner in.
RUN groupadd --gid 10001 knnmoe \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin knnmoe \
    && install --directory --owner=10001 --group=10001 --mode=0750 /var/lib/knnmoe /run/knnmoe
COPY --from=build /opt/knnmoe /opt/knnmoe
ENV PATH=/opt/knnmoe/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ROUTER_SERVICE_DATA=/var/lib/knnmoe \
    ROUTER_SERVICE_LISTEN=unix:/run/knnmoe/router.sock \
    ROUTER_ADMIN_TARGET=unix:/run/knnmoe/router.sock
VOLUME ["/var/lib/knnmoe", "/run/knnmoe"]
USER 10001:10001
# A tenth of a second of CPU each; engines before 25 know no --start-interval, so the first comes after one interval.
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-m", "knnmoe.probe"]
ENTRYPOINT ["router-service"]
CMD ["serve"]
