# The embedded trainer on GPUs: PyTorch, megatron-core, Transformer Engine, vLLM, this package.
#
#   docker build -f docker/trainer.Dockerfile -t nemo_apo-trainer .
#
# Linted, never built. BASE is an image of PyTorch with CUDA's compiler; name it by its digest
# (BASE=...@sha256:...) for builds that can be repeated.
ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3
# hadolint ignore=DL3006
FROM ${BASE}

ARG MEGATRON_CORE=0.16.1
# Empty leaves out what the base may hold already.
ARG TRANSFORMER_ENGINE=
ARG VLLM=
ARG USER_ID=1000

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

WORKDIR /opt/nemo_apo
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY nemo_apo nemo_apo

# What the base holds, torch above all, stays as it is.
RUN python -m pip list --format=freeze | grep -E '^(torch|numpy)==' >/tmp/base.txt \
    && python -m pip install --constraint /tmp/base.txt "megatron-core==${MEGATRON_CORE}" \
    && python -m pip install --constraint /tmp/base.txt '.[trainer,math,hf]' \
    && if [ -n "${TRANSFORMER_ENGINE}" ]; then \
        python -m pip install --constraint /tmp/base.txt --no-build-isolation \
            "transformer-engine[pytorch]==${TRANSFORMER_ENGINE}"; fi \
    && if [ -n "${VLLM}" ]; then \
        python -m pip install --constraint /tmp/base.txt "vllm==${VLLM}"; fi

RUN useradd --create-home --uid "${USER_ID}" trainer
USER ${USER_ID}
WORKDIR /home/trainer

HEALTHCHECK --interval=5m --timeout=2m CMD ["nemo-apo", "doctor"]
CMD ["nemo-apo", "--help"]
