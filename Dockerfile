# syntax=docker/dockerfile:1
# One image runs every line of the Procfile. It holds what the service runs on, nothing for tests or building.

FROM python:3.13-slim AS build
WORKDIR /build
COPY requirements-runtime.lock requirements-build.lock ./
# Hashed wheels only, as in a clone; the build backend stays in this stage.
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --disable-pip-version-check --only-binary :all: \
      --require-hashes --requirement requirements-runtime.lock \
 && python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action ignore \
      --only-binary :all: --require-hashes --requirement requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY producers producers
COPY workers workers
COPY ops ops
RUN python -m pip wheel --no-cache-dir --disable-pip-version-check --no-build-isolation --no-deps \
      --wheel-dir /dist . \
 && /venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-index --no-deps /dist/*.whl

FROM python:3.13-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin fairlane
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
# The packages are in /venv. `fairlane up` reads the Procfile, and its flower line names this file by path.
COPY Procfile ./
COPY workers/flowerconfig.py workers/
USER fairlane
EXPOSE 8000
CMD ["python", "-m", "producers"]
