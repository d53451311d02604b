# polarctl as an image, without and with CUDA:
#
#   docker build --target cpu -t polarctl:cpu .
#   docker build --target cuda -t polarctl:cuda .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" polarctl:cpu score candidates.jsonl -m runs/rm -o scores.jsonl
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" --user "$(id -u):$(id -g)" polarctl:cuda pretrain ...
#   docker run --rm -p 8000:8000 -e POLARCTL_SERVER_KEY -v "$PWD:/work" polarctl:cpu serve -m runs/rm --host 0.0.0.0
#
# EXTRAS chooses optional packages (pyproject.toml): --build-arg EXTRAS=serve,rft,data; TORCH_INDEX is
# for a mirror of the CPU builds of torch.
# No secret goes into an image: give tokens and keys with `docker run -e`.

ARG PYTHON=3.12

# The wheel alone goes on from here, neither the sources nor what builds them.
FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY polarctl polarctl
COPY stages stages
COPY schemas schemas
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:${PYTHON}-slim AS base
# A user that can write into /work and /tmp only. HOME is /tmp for `--user` too; to keep models from
# the Hub: -v "$HOME/.cache/huggingface:/cache" -e HF_HOME=/cache
RUN useradd --no-create-home --home-dir /tmp --uid 1000 polar && mkdir /work && chown polar /work
ENV HOME=/tmp PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["polarctl"]
CMD ["--help"]

FROM base AS cpu
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,data
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch==${TORCH}"
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir "$(echo /wheel/*.whl)[${EXTRAS}]"
USER polar

# PyPI's torch for Linux brings the CUDA libraries; the host has only the driver and the container toolkit.
FROM base AS cuda
ARG TORCH=2.13.0
ARG EXTRAS=serve,data,lora
# Triton compiles kernels at run time.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "torch==${TORCH}"
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir "$(echo /wheel/*.whl)[${EXTRAS}]"
USER polar
