-- depends: 0008_answer_types

-- Which versions of TimescaleDB have shown that their book-keeping marks a late row, as the answers
-- rely on. migrate adds a row when it meets a new version.
CREATE TABLE rollup_probe (
  timescaledb_version  text PRIMARY KEY,
  trusted              boolean     NOT NULL,
  probed_at            timestamptz NOT NULL DEFAULT now()
);
