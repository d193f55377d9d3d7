-- name: fetch_server
-- What kind of server this is; NULL where TimescaleDB is not to be had or not yet created.
SELECT current_setting('server_version_num')::int AS server_version_num,
       (SELECT default_version FROM pg_available_extensions WHERE name = 'timescaledb') AS available,
       (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb') AS installed

-- name: reconcile_policies
SELECT reconcile_policies(
  chunk => %(chunk)s, columnstore_after => %(columnstore_after)s, raw_retention => %(raw_retention)s,
  hourly_retention => %(hourly_retention)s, refresh_start => %(refresh_start)s,
  refresh_end => %(refresh_end)s, refresh_every => %(refresh_every)s,
  quarantine_retention => %(quarantine_retention)s)

-- name: fetch_probe
-- Whether this version of TimescaleDB keeps its books as the answers rely on; no row: not probed.
SELECT trusted FROM rollup_probe
WHERE timescaledb_version = (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb')

-- name: add_probe
INSERT INTO rollup_probe (timescaledb_version, trusted)
SELECT extversion, %(trusted)s FROM pg_extension WHERE extname = 'timescaledb'
ON CONFLICT (timescaledb_version) DO NOTHING

-- name: create_probe
CREATE TABLE rollup_probe_history (ts timestamptz NOT NULL, kwh float8 NOT NULL);
SELECT create_hypertable('rollup_probe_history', by_range('ts', INTERVAL '1 day'));
CREATE MATERIALIZED VIEW rollup_probe_hourly
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT time_bucket(INTERVAL '1 hour', ts) AS hour, sum(kwh) AS kwh
FROM rollup_probe_history GROUP BY 1 WITH NO DATA;
INSERT INTO rollup_probe_history
SELECT t, 1 FROM generate_series('2020-01-01 00:10Z'::timestamptz, '2020-01-01 03:10Z', '1 hour') t

-- name: refresh_probe
CALL refresh_continuous_aggregate('rollup_probe_hourly', '2020-01-01 00:00Z', '2020-01-01 03:00Z')

-- name: add_late_probe_row
INSERT INTO rollup_probe_history VALUES ('2020-01-01 01:20Z', 1)

-- name: fetch_probe_dirty
-- Whether the hour of the late row is dirty, and the one before it.
SELECT dirty @> '2020-01-01 01:00Z'::timestamptz, dirty @> '2020-01-01 00:00Z'::timestamptz
FROM rollup_dirty_hours('rollup_probe_hourly', '2020-01-01 00:00Z', '2020-01-01 02:00Z') AS dirty

-- name: drop_probe
DROP MATERIALIZED VIEW IF EXISTS rollup_probe_hourly;
DROP TABLE IF EXISTS rollup_probe_history

-- name: distrust_rollup
-- Where the books cannot be relied on, every hour that has raw rows is read from them.
CREATE OR REPLACE FUNCTION rollup_dirty_ranges(rollup name, since timestamptz, until timestamptz)
RETURNS TABLE (lowest timestamptz, highest timestamptz)
LANGUAGE sql STABLE AS $$ SELECT since, until $$

-- name: fetch_kept
-- The retention so far of raw readings or hourly rollups, and the oldest chunk, where a shorter
-- one would drop it.
SELECT kept, oldest FROM (
  SELECT max((j.config ->> 'drop_after')::interval) AS kept, min(c.oldest) AS oldest
  FROM timescaledb_information.jobs j
  LEFT JOIN timescaledb_information.continuous_aggregates a
    ON a.materialization_hypertable_name = j.hypertable_name
  LEFT JOIN LATERAL (
    SELECT min(range_start) AS oldest FROM timescaledb_information.chunks
    WHERE hypertable_name = coalesce(a.materialization_hypertable_name, j.hypertable_name)) c ON true
  WHERE j.proc_name = 'policy_retention'
    AND coalesce(a.view_name, j.hypertable_name) IN (
      CASE %(kind)s WHEN 'raw' THEN 'meter_telemetry_history' ELSE 'meter_hourly' END,
      CASE %(kind)s WHEN 'raw' THEN 'vehicle_telemetry_history' ELSE 'vehicle_hourly' END)) k
WHERE kept > %(retention)s AND oldest < now() - %(retention)s

-- name: vacuum
VACUUM (ANALYZE) meter_live_status, vehicle_live_status, meter, vehicle, charging_assignment,
                 quarantine, job_run

-- name: fetch_applied
-- The migrations that this database has.
SELECT migration_id FROM _yoyo_migration

-- name: fetch_job_status
SELECT job_id, job, relation, schedule_interval, scheduled, last_started, last_succeeded, last_ok,
       last_error
FROM job_status ORDER BY job_id

-- name: fetch_due_jobs
-- In the order in which they should run; a job without a record is due. Retention that is held back
-- is among them: its gate is asked again when its turn comes.
SELECT s.job_id, s.job, s.relation, j.config ->> 'end_offset' AS end_offset
FROM job_status s JOIN timescaledb_information.jobs j USING (job_id)
WHERE (s.scheduled OR s.job = 'policy_retention')
  AND (%(all)s OR s.last_started IS NULL
       OR s.last_started + s.schedule_interval <= %(now)s)
ORDER BY array_position(
           ARRAY['policy_refresh_continuous_aggregate', 'policy_compression', 'hold_retention',
                 'policy_retention', 'sweep_expired'], s.job::text),
         s.relation LIKE '%%daily', s.job_id

-- name: fetch_job_scheduled
SELECT scheduled FROM timescaledb_information.jobs WHERE job_id = %(job_id)s

-- name: fetch_dirty_pieces
-- The parts of a rollup that are dirty and have rows to roll up, one chunk each: those of its refresh
-- window, and older ones that an outage left behind. A dropped chunk is no part, so its rollup stays.
WITH source AS (
  SELECT coalesce(parent.mat_hypertable_id, a.raw_hypertable_id) AS hypertable_id
  FROM _timescaledb_catalog.continuous_agg a
  LEFT JOIN _timescaledb_catalog.continuous_agg parent
    ON parent.mat_hypertable_id = a.parent_mat_hypertable_id
  WHERE a.user_view_schema = 'public' AND a.user_view_name = %(rollup)s
), chunk AS (
  SELECT tstzrange(_timescaledb_functions.to_timestamp(s.range_start),
                   _timescaledb_functions.to_timestamp(s.range_end)) AS span
  FROM source
  JOIN _timescaledb_catalog.dimension USING (hypertable_id)
  JOIN _timescaledb_catalog.dimension_slice s ON s.dimension_id = dimension.id
), bounds AS (
  SELECT date_bin(%(bucket)s, min(lower(span)), 'epoch') AS lo,
         date_bin(%(bucket)s, %(now)s - %(end_offset)s::interval, 'epoch') AS hi
  FROM chunk
), dirty AS (
  SELECT range_agg(tstzrange(date_bin(%(bucket)s, lowest, 'epoch'),
                             date_bin(%(bucket)s, highest, 'epoch') + %(bucket)s)) AS ranges
  FROM bounds, LATERAL rollup_dirty_ranges(%(rollup)s, lo, hi)
  WHERE lo < hi
)
SELECT lower(piece) AS since, upper(piece) AS until
FROM bounds, dirty, chunk,
  LATERAL (SELECT ranges * tstzmultirange(span * tstzrange(lo, hi)) AS part) p,
  LATERAL (SELECT range_merge(part) AS piece) m
WHERE lo < hi AND NOT isempty(part)
ORDER BY 1

-- name: add_job_run
INSERT INTO job_run (job_id, job_name, started_at, finished_at, succeeded, error)
VALUES (%(job_id)s, %(job_name)s, %(started_at)s, %(finished_at)s, %(succeeded)s, %(error)s)
