-- name: fetch_server
-- What kind of server this is; NULL where TimescaleDB is not to be had or not yet created.
SELECT current_setting('server_version_num')::int AS server_version_num,
       (SELECT default_version FROM pg_available_extensions WHERE name = 'timescaledb') AS available,
       (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb') AS installed,
       current_setting('timescaledb.license', true) AS license

-- name: reconcile_policies
SELECT reconcile_policies(
  chunk => %(chunk)s, columnstore_after => %(columnstore_after)s, raw_retention => %(raw_retention)s,
  hourly_retention => %(hourly_retention)s, refresh_start => %(refresh_start)s,
  refresh_end => %(refresh_end)s, refresh_every => %(refresh_every)s,
  quarantine_retention => %(quarantine_retention)s)

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
SELECT s.job_id, s.job, s.relation,
       j.config ->> 'start_offset' AS start_offset, j.config ->> 'end_offset' AS end_offset
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
-- The parts of a rollup's refresh window that are dirty and have rows to roll up, one chunk each.
WITH bounds AS (
  SELECT date_bin(%(bucket)s, %(now)s - %(start_offset)s::interval, 'epoch') AS lo,
         date_bin(%(bucket)s, %(now)s - %(end_offset)s::interval, 'epoch') AS hi
), source AS (
  SELECT coalesce(parent.mat_hypertable_id, a.raw_hypertable_id) AS hypertable_id, a.mat_hypertable_id
  FROM _timescaledb_catalog.continuous_agg a
  LEFT JOIN _timescaledb_catalog.continuous_agg parent
    ON parent.mat_hypertable_id = a.parent_mat_hypertable_id
  WHERE a.user_view_schema = 'public' AND a.user_view_name = %(rollup)s
), watermark AS (
  SELECT _timescaledb_functions.to_timestamp(w.watermark) AS reached
  FROM source JOIN _timescaledb_catalog.continuous_aggs_watermark w USING (mat_hypertable_id)
), dirty AS (
  SELECT range_agg(tstzrange(date_bin(%(bucket)s, lowest, 'epoch'),
                             date_bin(%(bucket)s, highest, 'epoch') + %(bucket)s)) AS ranges
  FROM bounds,
    LATERAL (SELECT lowest, highest FROM rollup_dirty_ranges(%(rollup)s, lo, hi)
             UNION ALL
             SELECT greatest(lo, reached), hi FROM watermark WHERE reached < hi) d
), chunk AS (
  SELECT tstzmultirange(tstzrange(
           _timescaledb_functions.to_timestamp(s.range_start),
           _timescaledb_functions.to_timestamp(s.range_end))) AS span
  FROM source
  JOIN _timescaledb_catalog.dimension USING (hypertable_id)
  JOIN _timescaledb_catalog.dimension_slice s ON s.dimension_id = dimension.id
)
SELECT lower(piece) AS since, upper(piece) AS until
FROM bounds, dirty, chunk,
  LATERAL (SELECT ranges * span * tstzmultirange(tstzrange(lo, hi)) AS part) p,
  LATERAL (SELECT range_merge(part) AS piece) m
WHERE lo < hi AND NOT isempty(part)
ORDER BY 1

-- name: add_job_run
INSERT INTO job_run (job_id, job_name, started_at, finished_at, succeeded, error)
VALUES (%(job_id)s, %(job_name)s, %(started_at)s, %(finished_at)s, %(succeeded)s, %(error)s)
