-- Policies: what runs by itself. `migrate` reconciles them with the settings; a policy that is as
-- it should be is left alone, so that its statistics and its next start are kept.

-- Make the policy of one kind on one relation be exactly this.
CREATE OR REPLACE FUNCTION reconcile_policy(
  relation regclass, policy text, wanted jsonb, every interval DEFAULT NULL)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  job record;
  job_id integer;
BEGIN
  SELECT j.job_id, j.config - ARRAY['hypertable_id', 'mat_hypertable_id'] AS config,
         j.schedule_interval
  INTO job
  FROM timescaledb_information.jobs j
  WHERE j.proc_name = policy
    AND coalesce(j.config ->> 'mat_hypertable_id', j.config ->> 'hypertable_id')::integer
        = public.hypertable_number(relation);
  IF FOUND AND job.config @> wanted AND (every IS NULL OR job.schedule_interval = every) THEN
    RETURN;
  END IF;
  IF FOUND THEN
    PERFORM public.delete_job(job.job_id);
  END IF;
  CASE policy
    WHEN 'policy_refresh_continuous_aggregate' THEN
      job_id := public.add_continuous_aggregate_policy(
        relation, start_offset => (wanted ->> 'start_offset')::interval,
        end_offset => (wanted ->> 'end_offset')::interval, schedule_interval => every);
    WHEN 'policy_compression' THEN
      -- CALL add_columnstore_policy gives no job id back; the older name does the same.
      job_id := public.add_compression_policy(
        relation, compress_after => (wanted ->> 'compress_after')::interval);
    WHEN 'policy_retention' THEN
      -- Held until hold_retention() has seen every refresh succeed.
      job_id := public.add_retention_policy(
        relation, drop_after => (wanted ->> 'drop_after')::interval);
      PERFORM public.alter_job(job_id, scheduled => false);
  END CASE;
  IF every IS NOT NULL THEN
    PERFORM public.alter_job(job_id, schedule_interval => every);
  END IF;
END $$;

-- The number by which jobs know a hypertable or the materialization of an aggregate.
CREATE OR REPLACE FUNCTION hypertable_number(relation regclass) RETURNS integer
LANGUAGE sql STABLE AS $$
  SELECT coalesce(
    (SELECT a.mat_hypertable_id FROM _timescaledb_catalog.continuous_agg a
     WHERE format('%I.%I', a.user_view_schema, a.user_view_name)::regclass = relation),
    (SELECT h.id FROM _timescaledb_catalog.hypertable h
     JOIN pg_class c ON c.relname = h.table_name
     JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = h.schema_name
     WHERE c.oid = relation))
$$;

-- Every policy and job that there should be.
CREATE OR REPLACE FUNCTION wanted_policies(
  columnstore_after interval, raw_retention interval, hourly_retention interval,
  refresh_start interval, refresh_end interval, refresh_every interval,
  quarantine_retention interval, quarantine_bytes_max bigint)
RETURNS TABLE (relation text, policy text, every interval, config jsonb)
LANGUAGE sql STABLE AS $$
  SELECT w.*
  FROM (VALUES ('meter'), ('vehicle')) AS c (class), LATERAL (VALUES
    (class || '_hourly', 'policy_refresh_continuous_aggregate', refresh_every,
     jsonb_build_object('start_offset', refresh_start, 'end_offset', refresh_end)),
    -- Windows are aligned inward and jobs lag: the daily rollup gets days of slack, not hours.
    (class || '_daily', 'policy_refresh_continuous_aggregate', INTERVAL '1 hour',
     jsonb_build_object('start_offset', refresh_start + INTERVAL '2 days',
                        'end_offset', greatest(refresh_end, INTERVAL '1 day'))),
    (class || '_telemetry_history', 'policy_compression', INTERVAL '6 hours',
     jsonb_build_object('compress_after', columnstore_after)),
    (class || '_telemetry_history', 'policy_retention', INTERVAL '1 day',
     jsonb_build_object('drop_after', raw_retention)),
    (class || '_hourly', 'policy_retention', INTERVAL '1 day',
     jsonb_build_object('drop_after', hourly_retention))) AS w
  UNION ALL VALUES
    (NULL, 'hold_retention', INTERVAL '15 minutes', '{}'::jsonb),
    (NULL, 'sweep_expired', INTERVAL '1 hour',
     jsonb_build_object('drop_after', quarantine_retention, 'bytes_max', quarantine_bytes_max))
$$;

-- Of the releases before quarantine had a bound.
DROP FUNCTION IF EXISTS reconcile_policies(
  interval, interval, interval, interval, interval, interval, interval, interval);

CREATE OR REPLACE FUNCTION reconcile_policies(
  chunk interval, columnstore_after interval, raw_retention interval, hourly_retention interval,
  refresh_start interval, refresh_end interval, refresh_every interval,
  quarantine_retention interval, quarantine_bytes_max bigint)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  wanted record;
BEGIN
  PERFORM public.set_chunk_time_interval(history, chunk)
  FROM unnest(ARRAY['public.meter_telemetry_history',
                    'public.vehicle_telemetry_history']::regclass[]) history;
  FOR wanted IN SELECT * FROM public.wanted_policies(
    columnstore_after, raw_retention, hourly_retention, refresh_start, refresh_end, refresh_every,
    quarantine_retention, quarantine_bytes_max)
  LOOP
    IF wanted.relation IS NOT NULL THEN
      PERFORM public.reconcile_policy(
        format('public.%I', wanted.relation)::regclass, wanted.policy, wanted.config, wanted.every);
    ELSIF NOT EXISTS (
      SELECT FROM timescaledb_information.jobs j
      WHERE j.proc_schema = 'public' AND j.proc_name = wanted.policy
        AND j.config = wanted.config AND j.schedule_interval = wanted.every)
    THEN  -- a job of our own
      PERFORM public.delete_job(j.job_id) FROM timescaledb_information.jobs j
      WHERE j.proc_schema = 'public' AND j.proc_name = wanted.policy;
      PERFORM public.add_job(
        format('public.%I', wanted.policy)::regproc, wanted.every, config => wanted.config);
    END IF;
  END LOOP;
END $$;

-- When each job last ran and how, whether TimescaleDB's workers ran it or the service did.
CREATE OR REPLACE VIEW job_status AS
SELECT j.job_id,
       j.proc_name AS job,
       coalesce(a.view_name, j.hypertable_name)::text AS relation,
       j.schedule_interval,
       j.scheduled,
       s.last_started,
       s.last_succeeded,
       s.last_ok,
       s.last_error
FROM timescaledb_information.jobs j
LEFT JOIN timescaledb_information.continuous_aggregates a
  ON a.materialization_hypertable_name = j.hypertable_name
LEFT JOIN LATERAL (
  SELECT r.last_started, max(r.last_succeeded) OVER () AS last_succeeded, r.last_ok, r.last_error
  FROM (
    SELECT t.last_run_started_at, nullif(t.last_successful_finish, '-infinity'),
           t.last_run_status = 'Success',
           (SELECT e.err_message FROM timescaledb_information.job_errors e
            WHERE e.job_id = j.job_id AND t.last_run_status <> 'Success'
            ORDER BY e.start_time DESC LIMIT 1)
    FROM timescaledb_information.job_stats t
    WHERE t.job_id = j.job_id AND t.last_run_started_at > '-infinity'
    UNION ALL
    (SELECT o.started_at,
            (SELECT max(ok.finished_at) FROM public.job_run ok
             WHERE ok.job_id = j.job_id AND ok.succeeded),
            o.succeeded, o.error
     FROM public.job_run o WHERE o.job_id = j.job_id
     ORDER BY o.started_at DESC, o.job_run_id DESC LIMIT 1)
  ) AS r (last_started, last_succeeded, last_ok, last_error)
  ORDER BY r.last_started DESC LIMIT 1
) s ON true
WHERE j.job_id >= 1000;

-- Raw data waits while a refresh is failing or late, and while what would be dropped is not rolled
-- up. A refresh that is running (last_ok is NULL) is judged by its last success.
CREATE OR REPLACE PROCEDURE hold_retention(job_id integer, config jsonb)
LANGUAGE plpgsql AS $$
DECLARE
  safe boolean := NOT EXISTS (
      SELECT FROM public.job_status s
      WHERE s.job = 'policy_refresh_continuous_aggregate'
        AND s.relation IN ('meter_hourly', 'vehicle_hourly', 'meter_daily', 'vehicle_daily')
        AND (NOT s.last_ok OR s.last_succeeded IS NULL
             OR s.last_succeeded < now() - INTERVAL '1 hour' - 3 * s.schedule_interval))
    AND NOT EXISTS (
      SELECT FROM timescaledb_information.jobs j, (VALUES ('meter'), ('vehicle')) AS c (class)
      WHERE j.proc_name = 'policy_retention' AND j.hypertable_schema = 'public'
        AND j.hypertable_name = c.class || '_telemetry_history'
        AND public.unrolled_hours(c.class, now() - (j.config ->> 'drop_after')::interval) > 0);
BEGIN
  PERFORM public.alter_job(s.job_id, scheduled => safe)
  FROM public.job_status s
  WHERE s.job = 'policy_retention' AND s.scheduled <> safe
    AND s.relation IN ('meter_telemetry_history', 'vehicle_telemetry_history',
                       'meter_hourly', 'vehicle_hourly');
END $$;

-- How many device hours before an instant the hourly rollup lacks, or holds otherwise than raw readings
-- say. The refresh window reaches all that is accepted, if it runs: after an outage of days, late readings
-- can have aged past it. Only dirty hours are looked at; not all of those are wrong (dropping a chunk
-- marks an hour of the next one).
CREATE OR REPLACE FUNCTION unrolled_hours(device_class text, before timestamptz)
RETURNS bigint LANGUAGE plpgsql STABLE AS $$
DECLARE
  piece tstzrange;
  unrolled bigint := 0;
BEGIN
  FOR piece IN
    SELECT r FROM unnest(public.whole_hours(
      public.raw_dirty_hours(device_class, '-infinity', before))) r
  LOOP
    IF device_class = 'meter' THEN
      unrolled := unrolled + (
        SELECT count(*)
        FROM (SELECT meter_id, date_bin('1 hour', ts, 'epoch') AS hour, count(*) AS readings,
                     sum(kwh_consumed_ac) AS kwh_sum,
                     public.counter_increase(kwh_consumed_ac ORDER BY ts) AS kwh_increase,
                     public.last(kwh_consumed_ac, ts) AS kwh_last
              FROM public.meter_telemetry_history
              WHERE ts >= lower(piece) AND ts < upper(piece) GROUP BY 1, 2) r
        FULL JOIN (SELECT * FROM public.meter_hourly_materialized
                   WHERE hour >= lower(piece) AND hour < upper(piece)) h USING (meter_id, hour)
        WHERE (r.readings, r.kwh_last) IS DISTINCT FROM (h.readings, h.kwh_last)
           OR NOT public.is_close(r.kwh_sum, h.kwh_sum)
           OR NOT public.is_close(r.kwh_increase, h.kwh_increase));
    ELSE
      unrolled := unrolled + (
        SELECT count(*)
        FROM (SELECT vehicle_id, date_bin('1 hour', ts, 'epoch') AS hour, count(*) AS readings,
                     sum(kwh_delivered_dc) AS kwh_sum,
                     public.counter_increase(kwh_delivered_dc ORDER BY ts) AS kwh_increase,
                     public.last(kwh_delivered_dc, ts) AS kwh_last,
                     sum(battery_temp) AS temp_sum
              FROM public.vehicle_telemetry_history
              WHERE ts >= lower(piece) AND ts < upper(piece) GROUP BY 1, 2) r
        FULL JOIN (SELECT * FROM public.vehicle_hourly_materialized
                   WHERE hour >= lower(piece) AND hour < upper(piece)) h USING (vehicle_id, hour)
        WHERE (r.readings, r.kwh_last) IS DISTINCT FROM (h.readings, h.kwh_last)
           OR NOT public.is_close(r.kwh_sum, h.kwh_sum)
           OR NOT public.is_close(r.kwh_increase, h.kwh_increase)
           OR NOT public.is_close(r.temp_sum, h.battery_temp_sum));
    END IF;
  END LOOP;
  RETURN unrolled;
END $$;

-- Whether two sums are the same but for the order in which they were added up.
CREATE OR REPLACE FUNCTION is_close(a float8, b float8) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
  SELECT abs(a - b) <= 1e-9 * greatest(abs(a), abs(b), 1)
$$;

-- Quarantine past its retention or over its bound, the record of the service's own job runs, and flags of
-- readings that no hourly rollup speaks of any more. What is kept in quarantine is summed up only where the
-- table has grown so large on disk; an entry without its payload takes about 500 bytes, with its
-- indexes.
CREATE OR REPLACE PROCEDURE sweep_expired(job_id integer, config jsonb)
LANGUAGE plpgsql AS $$
DECLARE
  bytes_max constant bigint := (config ->> 'bytes_max')::bigint;
BEGIN
  DELETE FROM public.quarantine WHERE last_seen < now() - (config ->> 'drop_after')::interval;
  IF pg_total_relation_size('public.quarantine') > bytes_max THEN
    DELETE FROM public.quarantine
    WHERE quarantine_id IN (
      SELECT quarantine_id
      FROM (SELECT quarantine_id, sum(octet_length(payload) + 500)
                     OVER (ORDER BY last_seen DESC, quarantine_id DESC) AS bytes
            FROM public.quarantine) kept
      WHERE bytes > bytes_max);
  END IF;
  DELETE FROM public.job_run WHERE started_at < now() - INTERVAL '90 days';
  DELETE FROM public.suspect_reading s USING public.job_status p
  JOIN timescaledb_information.jobs j USING (job_id)
  WHERE p.job = 'policy_retention' AND p.relation = s.device_class || '_hourly'
    AND s.ts < now() - (j.config ->> 'drop_after')::interval;
END $$;
