# Controller, loader workers and the `headrace` command; also the image of a Ray cluster's nodes.
#   docker build -f deploy/docker/server.Dockerfile -t headrace-server .
# The policies need torch, but no GPU: TORCH_INDEX may name an index of wheels for CPUs alone,
# which are far smaller. Run file, tokens, keys and data are mounted, never copied in.
FROM python:3.11.13-slim-bookworm AS build
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/headrace \
 && /opt/headrace/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch
# With ray[default] a node serves jobs and the health checks that KubeRay makes.
RUN /opt/headrace/bin/pip install -c constraints.txt "ray[default]"
COPY LICENSE README.md pyproject.toml ./
COPY protos protos
COPY controller controller
COPY loader_workers loader_workers
COPY trainer_client trainer_client
COPY deploy deploy
RUN /opt/headrace/bin/pip install -c constraints.txt ".[server]"

FROM python:3.11.13-slim-bookworm
COPY --from=build /opt/headrace /opt/headrace
RUN groupadd --gid 1000 headrace \
 && useradd --uid 1000 --gid 1000 --create-home headrace \
 && install -d -o headrace -g headrace -m 0700 /runs /cache
# hadolint ignore=DL3064 # a tokenizer's, no secret
ENV PATH=/opt/headrace/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    TOKENIZERS_PARALLELISM=false
USER 1000:1000
WORKDIR /runs
VOLUME ["/runs", "/cache"]
EXPOSE 7700
# HEADRACE_ADMIN_TOKEN_FILE, HEADRACE_CA and HEADRACE_SERVER_NAME say how to ask; a worker, or a
# node of a Ray cluster, is started with --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["headrace", "status", "127.0.0.1:7700", "--json"]
CMD ["headrace", "controller", "/etc/headrace/run.yaml"]
