-- name: fetch_server
-- What kind of server this is; NULL where TimescaleDB is not to be had or not yet created.
SELECT current_setting('server_version_num')::int AS server_version_num,
       (SELECT default_version FROM pg_available_extensions WHERE name = 'timescaledb') AS available,
       (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb') AS installed

-- name: add_release
-- Unfinished until finish_release: what a migrate that was cut off left is no record to compare by.
INSERT INTO schema_release (checksum, printed_by)
SELECT %(checksum)s, concat_ws(' ', current_setting('server_version_num')::int / 10000, extversion,
                               md5(%(query)s))
FROM pg_extension WHERE extname = 'timescaledb'
ON CONFLICT (checksum) DO UPDATE SET printed_by = excluded.printed_by, migrated_at = NULL

-- name: finish_release
WITH cut_off AS (
  DELETE FROM schema_release WHERE checksum <> %(checksum)s AND migrated_at IS NULL
)
UPDATE schema_release SET migrated_at = now() WHERE checksum = %(checksum)s

-- name: fetch_release
-- The release that was applied last; without is_whole, its migrate was cut off. is_printed_alike: by
-- the server and the query that print definitions now.
SELECT checksum, migrated_at IS NOT NULL AS is_whole,
       printed_by = concat_ws(' ', current_setting('server_version_num')::int / 10000, extversion,
                              md5(%(query)s)) AS is_printed_alike
FROM schema_release, pg_extension WHERE extname = 'timescaledb'
ORDER BY migrated_at DESC NULLS FIRST LIMIT 1

-- name: fetch_is_applied
SELECT FROM schema_release WHERE checksum = %(checksum)s AND migrated_at IS NOT NULL

-- name: fetch_recorded
SELECT kind, name, definition FROM schema_fingerprint

-- name: record_objects
WITH object AS (
  SELECT * FROM unnest(%(kinds)s::text[], %(names)s::text[], %(definitions)s::text[])
    AS o (kind, name, definition)
), gone AS (
  DELETE FROM schema_fingerprint f
  WHERE NOT EXISTS (SELECT FROM object o WHERE o.kind = f.kind AND o.name = f.name)
)
INSERT INTO schema_fingerprint AS f (kind, name, definition) SELECT * FROM object
ON CONFLICT (kind, name) DO UPDATE SET definition = excluded.definition
WHERE f.definition <> excluded.definition

-- name: print_alike
-- Definitions do not depend on what a session has set.
SELECT set_config('search_path', 'pg_catalog', true), set_config('timezone', 'UTC', true),
       set_config('intervalstyle', 'postgres', true), set_config('datestyle', 'ISO, YMD', true)

-- name: fetch_objects
-- Everything in our schema with its definition: where it can be, the statement that makes it. What
-- belongs to an extension or to yoyo is not ours. TimescaleDB numbers its own tables, and may do so
-- anew, so numbers are no part of a definition.
WITH relation AS (
  SELECT c.oid, c.relname, c.relkind, c.relacl, c.relowner, c.reltype, c.relpersistence,
         c.relrowsecurity,
         CASE WHEN c.relkind IN ('v', 'm') THEN
           CASE WHEN a.user_view_name IS NULL THEN 'view' ELSE 'continuous aggregate' END
           WHEN c.relkind = 'c' THEN 'type' WHEN c.relkind = 'S' THEN 'sequence'
           ELSE 'table' END AS kind
  FROM pg_class c
  LEFT JOIN _timescaledb_catalog.continuous_agg a
    ON a.user_view_schema = 'public' AND a.user_view_name = c.relname
  WHERE c.relnamespace = 'public'::regnamespace AND c.relkind NOT IN ('i', 'I', 't')
    AND c.relname !~ '^_?yoyo_'
    AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass
                    AND d.objid = c.oid AND d.deptype = 'e')
), attribute AS (
  SELECT r.kind, r.relname, a.*
  FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid
  WHERE a.attnum > 0 AND NOT a.attisdropped AND r.kind <> 'sequence'
), routine AS (
  SELECT p.*, format('%I(%s)', p.proname, oidvectortypes(p.proargtypes)) AS name,
         CASE p.prokind WHEN 'a' THEN 'aggregate' WHEN 'p' THEN 'procedure'
                        ELSE 'function' END AS kind
  FROM pg_proc p
  WHERE p.pronamespace = 'public'::regnamespace
    AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass
                    AND d.objid = p.oid AND d.deptype = 'e')
), acl AS (
  SELECT format('public.%I', relname) AS object, NULL::text AS part,
         coalesce(relacl, acldefault('r', relowner)) AS items FROM relation WHERE kind <> 'sequence'
  UNION ALL
  SELECT format('SEQUENCE public.%I', relname), NULL, relacl FROM relation WHERE kind = 'sequence'
  UNION ALL
  SELECT format('public.%I', relname), format(' (%I)', attname), attacl FROM attribute
  UNION ALL
  SELECT 'ROUTINE public.' || name, NULL, coalesce(proacl, acldefault('f', proowner)) FROM routine
  UNION ALL
  SELECT 'SCHEMA public', NULL, nspacl FROM pg_namespace WHERE nspname = 'public'
  UNION ALL
  SELECT format('DATABASE %I', datname), NULL, coalesce(datacl, acldefault('d', datdba))
  FROM pg_database WHERE datname = current_database()
)
SELECT kind, relname::text AS name,
       CASE kind
         WHEN 'table' THEN concat_ws(
           ', ', CASE relpersistence WHEN 'u' THEN 'SET UNLOGGED' ELSE 'SET LOGGED' END,
           CASE WHEN relrowsecurity THEN 'ENABLE' ELSE 'DISABLE' END || ' ROW LEVEL SECURITY')
         WHEN 'type' THEN 'composite'
         ELSE regexp_replace(pg_get_viewdef(oid),
                             '_materialized_hypertable_\d+|cagg_watermark\(\d+\)', 'N', 'g')
       END AS definition
FROM relation WHERE kind <> 'sequence'
UNION ALL
SELECT 'column', format('%I.%I', a.relname, a.attname),
       format_type(a.atttypid, a.atttypmod)
       || CASE WHEN a.attcollation NOT IN (0, 100)
               THEN coalesce(' COLLATE ' || quote_ident(l.collname), '') ELSE '' END
       || CASE a.attidentity WHEN '' THEN '' ELSE ' GENERATED AS IDENTITY' END
       || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
       || coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '')
FROM attribute a
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
LEFT JOIN pg_collation l ON l.oid = a.attcollation
WHERE a.kind IN ('table', 'type')
UNION ALL
SELECT 'constraint', format('%I.%I', r.relname, c.conname),
       format('ALTER TABLE public.%I ADD CONSTRAINT %I %s', r.relname, c.conname,
              pg_get_constraintdef(c.oid))
FROM relation r JOIN pg_constraint c ON c.conrelid = r.oid AND c.contype IN ('c', 'f', 'p', 'u', 'x')
UNION ALL
SELECT 'index', format('%I.%I', r.relname, c.relname),
       pg_get_indexdef(c.oid) || CASE WHEN i.indisvalid THEN '' ELSE ' (not valid)' END
FROM relation r JOIN pg_index i ON i.indrelid = r.oid JOIN pg_class c ON c.oid = i.indexrelid
WHERE NOT EXISTS (SELECT FROM pg_constraint o WHERE o.conindid = c.oid AND o.conrelid = r.oid)
UNION ALL
SELECT 'trigger', format('%I.%I', r.relname, t.tgname), pg_get_triggerdef(t.oid)
FROM relation r JOIN pg_trigger t ON t.tgrelid = r.oid
WHERE NOT t.tgisinternal AND t.tgname NOT LIKE 'ts\_%'
UNION ALL
SELECT kind, name,
       CASE prokind WHEN 'a' THEN (SELECT concat_ws(' ', aggtransfn::regprocedure, aggtranstype::regtype,
                                                    aggfinalfn::regprocedure, agginitval)
                                   FROM pg_aggregate WHERE aggfnoid = routine.oid)
                    ELSE pg_get_functiondef(oid) END
FROM routine
UNION ALL
SELECT 'comment', kind || ' ' || relname,
       coalesce(obj_description(oid, 'pg_class'), obj_description(reltype, 'pg_type'))
FROM relation
WHERE coalesce(obj_description(oid, 'pg_class'), obj_description(reltype, 'pg_type')) IS NOT NULL
UNION ALL
SELECT 'comment', format('column %I.%I', relname, attname), col_description(attrelid, attnum)
FROM attribute WHERE col_description(attrelid, attnum) IS NOT NULL
UNION ALL
SELECT 'comment', kind || ' ' || name, obj_description(oid, 'pg_proc')
FROM routine WHERE obj_description(oid, 'pg_proc') IS NOT NULL
UNION ALL
SELECT 'grant', format('%s%s ON %s TO %s', g.privilege_type, acl.part, acl.object,
                       coalesce(o.rolname, 'PUBLIC')),
       CASE WHEN g.is_grantable THEN 'WITH GRANT OPTION' ELSE '' END
FROM acl, LATERAL aclexplode(acl.items) g LEFT JOIN pg_roles o ON o.oid = g.grantee
WHERE g.grantee = 0 OR o.rolname IN ('energy_reader', 'energy_ingest')

-- name: reconcile_policies
SELECT reconcile_policies(
  chunk => %(chunk)s, columnstore_after => %(columnstore_after)s, raw_retention => %(raw_retention)s,
  hourly_retention => %(hourly_retention)s, refresh_start => %(refresh_start)s,
  refresh_end => %(refresh_end)s, refresh_every => %(refresh_every)s,
  quarantine_retention => %(quarantine_retention)s,
  quarantine_bytes_max => %(quarantine_bytes_max)s)

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
    ON j.hypertable_name IN (a.view_name, a.materialization_hypertable_name)
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
