# Two targets: `cpu` (the default) and `cuda`. Both serve the default model until told otherwise:
#   docker build -t grok-server .
#   docker build -t grok-server:cuda --target cuda .
ARG BASE_IMAGE=python:3.12.12-slim-bookworm

# The wheel, which carries the default model.
FROM ${BASE_IMAGE} AS wheel
WORKDIR /src
COPY requirements/build.txt requirements/
RUN python3 -m venv /opt/build && /opt/build/bin/python -m pip install --no-cache-dir --require-hashes -r requirements/build.txt
COPY . .
RUN /opt/build/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

# All that the targets share: the user, the volumes, how it starts, is probed and stops.
FROM ${BASE_IMAGE} AS common
RUN useradd --uid 10001 --create-home grok && python3 -m venv /opt/grok-server && mkdir /model /cache && chown grok:grok /model /cache
ENV PATH=/opt/grok-server/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GROK_SERVER_HOST=0.0.0.0 \
    GROK_SERVER_PORT=8000 \
    GROK_SERVER_COMPILE_CACHE_DIR=/cache
EXPOSE 8000
VOLUME ["/model", "/cache"]
# Loading and compiling a large model takes many minutes, which do not count as failures.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['GROK_SERVER_PORT'] + '/readyz', timeout=2)"]
# Exec form: SIGTERM reaches the server itself, which drains and stops.
ENTRYPOINT ["grok-server"]
CMD ["serve"]

FROM common AS cuda
COPY requirements/cuda.txt /tmp/requirements.txt
RUN python -m pip install --no-cache-dir --require-hashes -r /tmp/requirements.txt
COPY --from=wheel /dist /tmp/dist
RUN python -m pip install --no-cache-dir --no-deps /tmp/dist/*.whl
USER grok
WORKDIR /home/grok

FROM common AS cpu
COPY requirements/runtime.txt /tmp/requirements.txt
RUN python -m pip install --no-cache-dir --require-hashes -r /tmp/requirements.txt
COPY --from=wheel /dist /tmp/dist
RUN python -m pip install --no-cache-dir --no-deps /tmp/dist/*.whl
USER grok
WORKDIR /home/grok
