# The trainer's side: torch, and the three packages that the client needs. No Ray, no controller.
#   docker build -f deploy/docker/trainer.Dockerfile -t headrace-trainer .
# For an image of your own, which brings its torch, the two lines that matter are the COPY of
# /wheels and the `pip install` after it.
FROM python:3.11.13-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY LICENSE README.md pyproject.toml constraints.txt ./
COPY protos protos
COPY controller controller
COPY loader_workers loader_workers
COPY trainer_client trainer_client
COPY deploy deploy
RUN pip wheel -c constraints.txt --wheel-dir /wheels . && cp constraints.txt /wheels/

FROM python:3.11.13-slim-bookworm
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
ARG TORCH_INDEX=""
COPY --from=build /wheels /wheels
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c /wheels/constraints.txt torch \
 && pip install --no-index --find-links /wheels -c /wheels/constraints.txt headrace \
 && groupadd --gid 1000 trainer \
 && useradd --uid 1000 --gid 1000 --create-home trainer
ENV PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/trainer
# Whether a rank is well is torchrun's to say, which starts it again; and a trainer goes on without
# the controller, so that asking for that would end what works.
HEALTHCHECK NONE
ENTRYPOINT ["torchrun"]
CMD ["--help"]
