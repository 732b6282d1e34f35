# NeMo-Aligner's branch llama-nemotron-dev with this package (docs/aligner.md).
#
#   docker build -f docker/nemo_aligner.Dockerfile --build-arg BASE=nvcr.io/nvidia/nemo@sha256:... \
#       -t nemo_apo-aligner .
#
# Linted, never built. BASE is the NeMo container that the branch was written for, with NeMo in /opt/NeMo.
ARG BASE=nvcr.io/nvidia/nemo:24.12
# hadolint ignore=DL3006
FROM ${BASE}

ARG ALIGNER_URL=https://github.com/NVIDIA/NeMo-Aligner.git
ARG ALIGNER_BRANCH=llama-nemotron-dev
# The commit that this package is tested against.
ARG ALIGNER_COMMIT=8c31926
# The branch's own changes to NeMo, relative to its checkout.
ARG NEMO_PATCH=nemo_aligner/experimental/grpo/NeMo-diff.patch
ARG USER_ID=1000

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

RUN git clone --branch "${ALIGNER_BRANCH}" "${ALIGNER_URL}" /opt/NeMo-Aligner-grpo \
    && git -C /opt/NeMo-Aligner-grpo checkout --detach "${ALIGNER_COMMIT}" \
    && git -C /opt/NeMo apply "/opt/NeMo-Aligner-grpo/${NEMO_PATCH}" \
    && python -m pip install --no-deps --editable /opt/NeMo-Aligner-grpo

# No dependency of the container may change.
COPY . /tmp/nemo_apo
RUN python -m pip wheel --no-deps --wheel-dir /tmp/wheels /tmp/nemo_apo \
    && python -m pip install --no-deps /tmp/wheels/nemo_apo-*.whl \
    && rm -r /tmp/nemo_apo /tmp/wheels \
    && python -c 'import nemo_apo.aligner.settings'

RUN useradd --create-home --uid "${USER_ID}" aligner
USER ${USER_ID}
WORKDIR /home/aligner

HEALTHCHECK --interval=5m --timeout=2m CMD ["python", "-m", "nemo_apo", "doctor"]
CMD ["python", "-m", "nemo_apo.aligner.train_gpt_apo", "--help"]
