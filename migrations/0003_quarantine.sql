-- depends: 0002_fleet

-- What was not a reading. Kept as it came, once for each sender and reason, with a count.

CREATE TABLE quarantine (
  quarantine_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  fingerprint    bytea            NOT NULL UNIQUE,
  payload        bytea            NOT NULL CHECK (length(payload) <= 65536),
  payload_bytes  bigint           NOT NULL,
  code           text             NOT NULL,
  path           text             NOT NULL,
  detail         text             NOT NULL,
  device_id      text COLLATE "C",
  key_id         text COLLATE "C",
  count          bigint           NOT NULL DEFAULT 1,
  first_seen     timestamptz      NOT NULL,
  last_seen      timestamptz      NOT NULL
);

CREATE INDEX quarantine_code_idx ON quarantine (code, quarantine_id);
CREATE INDEX quarantine_device_idx ON quarantine (device_id, quarantine_id);
CREATE INDEX quarantine_last_seen_idx ON quarantine (last_seen);

-- API keys. The secret is 32 random bytes; only its SHA-256 is kept.

CREATE TABLE api_key (
  key_id         text COLLATE "C" PRIMARY KEY,
  secret_sha256  bytea            NOT NULL CHECK (length(secret_sha256) = 32),
  name           text             NOT NULL,
  scopes         text[]           NOT NULL
                 CHECK (scopes <@ ARRAY['ingest', 'read', 'admin'] AND cardinality(scopes) > 0),
  device_ids     text[],
  device_prefix  text,
  created_at     timestamptz      NOT NULL DEFAULT now(),
  revoked_at     timestamptz,
  CHECK (device_ids IS NULL OR device_prefix IS NULL)
);

-- Jobs that the service ran itself, where the engine has no background workers.

CREATE TABLE job_run (
  job_run_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  job_id       integer     NOT NULL,
  job_name     text        NOT NULL,
  started_at   timestamptz NOT NULL,
  finished_at  timestamptz NOT NULL,
  succeeded    boolean     NOT NULL,
  error        text
);

CREATE INDEX job_run_job_idx ON job_run (job_id, started_at DESC);
