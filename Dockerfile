# The Python of the lock file and of the tests.
FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build

# Every package of the lock as a wheel, its hash checked. From here on pip needs no network.
COPY requirements/main.txt requirements/
RUN pip wheel --quiet --require-hashes --wheel-dir /wheels -r requirements/main.txt
RUN pip install --quiet --no-index --find-links /wheels hatchling editables

COPY pyproject.toml README.md ./
COPY migrations migrations
COPY sql sql
COPY src src
RUN pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir /wheels .

# Of the lock only what the program itself needs: no tests, no linters.
RUN python -m venv /opt/energy-platform \
 && /opt/energy-platform/bin/pip install --quiet --no-index --find-links /wheels energy-platform

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin energy
COPY --from=build /opt/energy-platform /opt/energy-platform
ENV PATH=/opt/energy-platform/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8080
ENTRYPOINT ["energy-platform"]
CMD ["serve"]
