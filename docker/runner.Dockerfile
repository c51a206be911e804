# The model runner, with torch. From the root of the repository, for the CPU:
#   docker build -f docker/runner.Dockerfile -t knnmoe/runner:0.1.0 .
# and for CUDA, whose libraries come with the wheels of PyPI:
#   docker build -f docker/runner.Dockerfile -t knnmoe/runner:0.1.0-cuda \
#       --build-arg CUDA=1 --build-arg TORCH_INDEX=https://pypi.org/simple .
FROM python:3.11-slim-trixie AS build
WORKDIR /src
COPY pyproject.toml constraints.txt docker/requirements.py docker/slim.sh docker/torch.sh ./
# Where packages come from, as pip has it; given or not: README.md.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# 1: torch may bring CUDA and its gigabytes.
ARG CUDA
# torch first and alone: what it needs comes from PyPI, pinned like everything else.
RUN pip install --no-cache-dir --constraint constraints.txt hatchling \
    && python -m venv --without-pip /opt/knnmoe \
    && sh torch.sh /opt/knnmoe \
    && python requirements.py runner > requirements.txt \
    && pip --python /opt/knnmoe/bin/python install --no-cache-dir --constraint constraints.txt --requirement requirements.txt \
    && sh slim.sh /opt/knnmoe
COPY README.md LICENSE ./
COPY protos protos
COPY router_service router_service
COPY model_runner model_runner
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/knnmoe/bin/python install --no-cache-dir --no-deps /wheels/*.whl

FROM python:3.11-slim-trixie
LABEL org.opencontainers.image.title="kNN-MoE model runner" \
    org.opencontainers.image.licenses="Apache-2.0"
# The sidecar's image has the same user: a Unix socket lets its owner in.
RUN groupadd --gid 10001 knnmoe \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin knnmoe \
    && install --directory --owner=10001 --group=10001 --mode=0750 /var/cache/knnmoe /run/knnmoe
COPY --from=build /opt/knnmoe /opt/knnmoe
ENV PATH=/opt/knnmoe/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/knnmoe \
    MPLCONFIGDIR=/tmp/matplotlib \
    MODEL_RUNNER_TARGET=unix:/run/knnmoe/router.sock
VOLUME ["/var/cache/knnmoe"]
USER 10001:10001
# A runner is a job, not a service.
HEALTHCHECK NONE
ENTRYPOINT ["model-runner"]
CMD ["--help"]
