-- Which readings are not plausible. A reading is judged by the one before it, if that is at most ten days
-- older; a device's first is not judged. Limits are power (kW), the step of a register (kWh), and what
-- temperature and charge may change in a minute.
--
-- Flags are a function of history and of what is declared: whatever changes the reading before another
-- has both judged again, so the order of arrival does not matter to them.

-- kWh that may have flowed between two readings, and the 0.1 kWh that a coarse counter jumps by. A
-- reading speaks of a reporting interval at least: an odd one in between makes nothing implausible.
CREATE OR REPLACE FUNCTION plausible_kwh(power_kw float8, elapsed interval, reporting interval)
RETURNS float8
LANGUAGE sql IMMUTABLE AS $$
  SELECT 0.1 + power_kw * date_part('epoch', greatest(elapsed, reporting)) / 3600
$$;

-- What may have changed between two readings at a rate per minute, and the 1 that a coarse sensor
-- jumps by.
CREATE OR REPLACE FUNCTION plausible_change(rate_per_minute float8, elapsed interval) RETURNS float8
LANGUAGE sql IMMUTABLE AS $$
  SELECT 1 + rate_per_minute * date_part('epoch', elapsed) / 60
$$;

-- Whether an energy may follow upon another: the test that decides who is looked at closely. Limits that
-- are NULL are none.
CREATE OR REPLACE FUNCTION is_energy_plausible(
  kwh float8, previous_kwh float8, elapsed interval, energy_kind text, reporting interval,
  power_kw float8, step_kwh float8)
RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE energy_kind
    WHEN 'register' THEN kwh >= previous_kwh
      AND coalesce(kwh - previous_kwh <= public.plausible_kwh(power_kw, elapsed, reporting), true)
      AND coalesce(kwh - previous_kwh <= step_kwh, true)
    ELSE coalesce(kwh <= public.plausible_kwh(power_kw, elapsed, reporting), true) END
$$;

-- By how many whole hours (1 to 14, to two minutes) a device's clock is behind ours; NULL: it is not. A
-- device that sends what it has kept is late too, but then its readings do not come at the pace of
-- its clock.
CREATE OR REPLACE FUNCTION clock_hours_behind(
  ts timestamptz, received_at timestamptz, previous_ts timestamptz,
  previous_received_at timestamptz)
RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
  SELECT round(date_part('epoch', received_at - ts) / 3600)::integer
  WHERE received_at - ts BETWEEN INTERVAL '58 minutes' AND INTERVAL '14 hours 2 minutes'
    AND abs(date_part('epoch', received_at - ts)
            - 3600 * round(date_part('epoch', received_at - ts) / 3600)) <= 120
    AND abs(date_part('epoch', (received_at - previous_received_at) - (ts - previous_ts)))
        <= date_part('epoch', ts - previous_ts) / 2
$$;

-- What is not plausible in a reading, as seen from the one before it. Limits that are NULL are none.
CREATE OR REPLACE FUNCTION implausibilities(
  r judged_reading, p judged_reading, energy_kind text, reporting interval,
  power_kw float8, step_kwh float8, temp_rate float8, soc_rate float8)
RETURNS TABLE (code text, detail text)
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  elapsed constant interval := r.ts - p.ts;
  minutes constant float8 := date_part('epoch', r.ts - p.ts) / 60;
  energy constant float8 := CASE energy_kind
    WHEN 'register' THEN public.register_step(r.kwh, p.kwh) ELSE r.kwh END;
  possible constant float8 := public.plausible_kwh(power_kw, elapsed, reporting);
  hours_behind constant integer :=
    public.clock_hours_behind(r.ts, r.received_at, p.ts, p.received_at);
BEGIN
  IF p.ts IS NULL OR elapsed > INTERVAL '10 days' THEN
    RETURN;
  END IF;
  IF energy > possible THEN
    -- In Wh it would be in place: by far too much, or just a thousand times what it was before.
    IF energy > 10 * possible AND energy / 1000 <= possible
       OR energy_kind = 'register' AND r.kwh / 1000 BETWEEN p.kwh - 0.1 AND p.kwh + possible
       OR energy_kind = 'interval' AND energy / 1000 BETWEEN p.kwh / 5 AND p.kwh * 5 THEN
      code := 'unit_mixup';
      detail := format('%s after %s kWh, %s minutes later, would be in place as Wh: is it sent in Wh?',
                       r.kwh, p.kwh, round(minutes::numeric, 1));
    ELSE
      code := 'power';
      detail := format('%s kWh within %s minutes are over %s kW',
                       energy, round(minutes::numeric, 1), power_kw);
    END IF;
    RETURN NEXT;
  END IF;
  IF energy_kind = 'register' AND energy > step_kwh THEN
    code := 'register_step';
    detail := format('the register went from %s to %s kWh, a step over %s kWh',
                     p.kwh, r.kwh, step_kwh);
    RETURN NEXT;
  END IF;
  IF abs(r.temp - p.temp) > public.plausible_change(temp_rate, elapsed) THEN
    code := 'temperature_rate';
    detail := format('from %s to %s degrees Celsius within %s minutes',
                     p.temp, r.temp, round(minutes::numeric, 1));
    RETURN NEXT;
  END IF;
  IF abs(r.soc - p.soc) > public.plausible_change(soc_rate, elapsed) THEN
    code := 'soc_rate';
    detail := format('from %s to %s %% within %s minutes', p.soc, r.soc, round(minutes::numeric, 1));
    RETURN NEXT;
  END IF;
  IF hours_behind IS NOT NULL THEN
    code := 'clock_offset';
    detail := format('the clock is %s hours behind, to the minute: a local time sent as UTC?',
                     hours_behind);
    RETURN NEXT;
  END IF;
END $$;

-- The readings of one device in since <= ts <= until, in the order of time.
CREATE OR REPLACE FUNCTION readings_to_judge(
  device_class text, device text, since timestamptz, until timestamptz)
RETURNS SETOF judged_reading
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_custom_plan AS $$
BEGIN
  IF device_class = 'meter' THEN
    RETURN QUERY
      SELECT h.ts, h.kwh_consumed_ac, NULL::float8, NULL::float8, h.received_at
      FROM public.meter_telemetry_history h
      WHERE h.meter_id = device AND h.ts >= since AND h.ts <= until ORDER BY h.ts;
  ELSE
    RETURN QUERY
      SELECT h.ts, h.kwh_delivered_dc, h.soc, h.battery_temp, h.received_at
      FROM public.vehicle_telemetry_history h
      WHERE h.vehicle_id = device AND h.ts >= since AND h.ts <= until ORDER BY h.ts;
  END IF;
END $$;

-- The last reading of one device before an instant, at most ten days before; NULL: there is none.
CREATE OR REPLACE FUNCTION reading_before(device_class text, device text, instant timestamptz)
RETURNS judged_reading
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
  found_reading public.judged_reading;
  reach interval;
BEGIN
  FOREACH reach IN ARRAY ARRAY[INTERVAL '1 hour', INTERVAL '10 days'] LOOP
    IF device_class = 'meter' THEN
      SELECT h.ts, h.kwh_consumed_ac, NULL, NULL, h.received_at INTO found_reading
      FROM public.meter_telemetry_history h
      WHERE h.meter_id = device AND h.ts >= instant - reach AND h.ts < instant
      ORDER BY h.ts DESC LIMIT 1;
    ELSE
      SELECT h.ts, h.kwh_delivered_dc, h.soc, h.battery_temp, h.received_at INTO found_reading
      FROM public.vehicle_telemetry_history h
      WHERE h.vehicle_id = device AND h.ts >= instant - reach AND h.ts < instant
      ORDER BY h.ts DESC LIMIT 1;
    END IF;
    EXIT WHEN found_reading.ts IS NOT NULL;
  END LOOP;
  RETURN found_reading;
END $$;

-- When one device read next after an instant, at most ten days after; NULL: it did not.
CREATE OR REPLACE FUNCTION next_reading_ts(device_class text, device text, instant timestamptz)
RETURNS timestamptz
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
  found_ts timestamptz;
  reach interval;
BEGIN
  FOREACH reach IN ARRAY ARRAY[INTERVAL '1 hour', INTERVAL '10 days'] LOOP
    IF device_class = 'meter' THEN
      SELECT h.ts INTO found_ts FROM public.meter_telemetry_history h
      WHERE h.meter_id = device AND h.ts > instant AND h.ts <= instant + reach
      ORDER BY h.ts LIMIT 1;
    ELSE
      SELECT h.ts INTO found_ts FROM public.vehicle_telemetry_history h
      WHERE h.vehicle_id = device AND h.ts > instant AND h.ts <= instant + reach
      ORDER BY h.ts LIMIT 1;
    END IF;
    EXIT WHEN found_ts IS NOT NULL;
  END LOOP;
  RETURN found_ts;
END $$;

-- Flag anew what is suspect in one device's readings of since <= ts <= until, and in the one after.
-- From -infinity to infinity that is all that is kept of it. A reading stays as it was judged where the one
-- before it may be among those that retention has dropped.
CREATE OR REPLACE FUNCTION judge_range(
  device_class text, device text, since timestamptz, until timestamptz)
RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  reach constant interval := INTERVAL '10 days';
  declared record;
  soft public.plausibility_limit;
  previous_ts timestamptz;
  last_ts timestamptz := until;
  dropped_hour timestamptz;  -- the last of the device whose raw rows are gone
  untold_ts timestamptz;     -- of the reading that followed upon it, perhaps
BEGIN
  IF isfinite(since) THEN
    previous_ts := (public.reading_before(device_class, device, since)).ts;
  END IF;
  IF isfinite(until) THEN
    last_ts := coalesce(public.next_reading_ts(device_class, device, until), until);
  END IF;
  IF previous_ts IS NULL THEN
    dropped_hour := public.last_dropped_hour(device_class, device);
    SELECT r.ts INTO untold_ts
    FROM public.readings_to_judge(device_class, device, since, last_ts) r
    WHERE dropped_hour IS NOT NULL LIMIT 1;
    IF untold_ts >= dropped_hour + INTERVAL '1 hour' + reach THEN
      untold_ts := NULL;
    END IF;
  END IF;
  DELETE FROM public.suspect_reading s
  WHERE s.device_class = judge_range.device_class AND s.device_id = device
    AND s.ts >= since AND s.ts <= last_ts AND s.ts IS DISTINCT FROM untold_ts
    AND (dropped_hour IS NULL OR s.ts >= dropped_hour + INTERVAL '1 hour');
  SELECT d.energy_kind, d.reporting_interval INTO declared
  FROM public.declared_device(device_class, device) d;
  SELECT * INTO soft FROM public.plausibility_limit l
  WHERE l.device_class = judge_range.device_class;
  INSERT INTO public.suspect_reading (device_class, device_id, ts, code, detail)
  SELECT judge_range.device_class, device, (j.r).ts, i.code, i.detail
  FROM (SELECT r, lag(r) OVER (ORDER BY r.ts) AS p
        FROM public.readings_to_judge(
          device_class, device, coalesce(previous_ts, since), last_ts) r) j
  CROSS JOIN LATERAL public.implausibilities(
    j.r, j.p, declared.energy_kind, declared.reporting_interval,
    soft.power_kw_soft, soft.step_kwh_soft, soft.temp_rate_soft, soft.soc_rate_soft) i
  WHERE (j.r).ts >= since
  ON CONFLICT DO NOTHING;
END $$;

-- The last hour of a device that is rolled up and has no raw rows any more; NULL: there is none.
CREATE OR REPLACE FUNCTION last_dropped_hour(device_class text, device text) RETURNS timestamptz
LANGUAGE plpgsql STABLE AS $$
DECLARE
  oldest constant timestamptz := coalesce(lower(public.raw_chunk_ranges(
    (device_class || '_telemetry_history')::name, '-infinity', 'infinity')), 'infinity');
BEGIN
  RETURN (public.rolled_before(device_class, device, oldest, oldest)).hour;
END $$;

-- What is declared of a device.
CREATE OR REPLACE FUNCTION declared_device(
  device_class text, device text, OUT energy_kind text, OUT reporting_interval interval)
LANGUAGE plpgsql STABLE AS $$
BEGIN
  IF device_class = 'meter' THEN
    SELECT m.energy_kind, m.reporting_interval INTO energy_kind, reporting_interval
    FROM public.meter m WHERE m.meter_id = device;
  ELSE
    SELECT v.energy_kind, v.reporting_interval INTO energy_kind, reporting_interval
    FROM public.vehicle v WHERE v.vehicle_id = device;
  END IF;
END $$;

-- Flag what is suspect among readings that this transaction has inserted, and in those that follow them.
-- For the writer, whose role may not change flags otherwise. Readings of a device that lie over an hour
-- apart are judged by themselves, so that what lies between costs nothing.
CREATE OR REPLACE FUNCTION judge_inserted(
  device_class text, devices text[], instants timestamptz[])
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  runs public.judged_run[];
BEGIN
  SELECT array_agg((r.device, r.since, r.until, NULL, NULL)::public.judged_run ORDER BY r.device, r.since)
  INTO runs
  FROM (SELECT k.device, min(k.ts) AS since, max(k.ts) AS until
        FROM (SELECT f.device, f.ts,
                     count(*) FILTER (WHERE f.is_far) OVER (PARTITION BY f.device ORDER BY f.ts) AS number
              FROM (SELECT u.device, u.ts,
                           u.ts - lag(u.ts) OVER (PARTITION BY u.device ORDER BY u.ts)
                             > INTERVAL '1 hour' AS is_far
                    FROM unnest(devices, instants) AS u (device, ts)) f) k
        GROUP BY k.device, k.number) r;
  IF cardinality(runs) > 1 THEN
    runs := public.judge_runs(device_class, runs);
  END IF;
  PERFORM public.judge_range($1, r.device, r.since, r.until) FROM unnest(runs) r;
END $$;

-- judge_range() of many runs of readings at once, as far as the readings before and after a run are within
-- an hour of it, or none can be after it. Returns the others.
CREATE OR REPLACE FUNCTION judge_runs(device_class text, runs judged_run[]) RETURNS judged_run[]
LANGUAGE plpgsql AS $$
DECLARE
  -- By column: what the two classes have in common. Put into the text, so that each plan is made for the
  -- chunks of these runs.
  history constant text := format(
    '(SELECT h.%1$s_id AS device, h.ts, h.received_at, %2$s FROM public.%1$s_telemetry_history h'
    ' WHERE h.ts >= %3$L AND h.ts <= %4$L)',
    device_class,
    CASE device_class
      WHEN 'meter' THEN 'h.kwh_consumed_ac AS kwh, NULL::float8 AS soc, NULL::float8 AS temp'
      ELSE 'h.kwh_delivered_dc AS kwh, h.soc, h.battery_temp AS temp' END,
    (SELECT min(r.since) FROM unnest(runs) r) - INTERVAL '1 hour',
    (SELECT max(r.until) FROM unnest(runs) r) + INTERVAL '1 hour');
  near public.judged_run[];
BEGIN
  EXECUTE format($query$
    SELECT array_agg((r.device, r.since, r.until, before.ts, coalesce(after.ts, r.until))::public.judged_run)
    FROM unnest($1) r
    LEFT JOIN public.%1$s_live_status live ON live.%1$s_id = r.device
    CROSS JOIN LATERAL (
      SELECT h.ts FROM %2$s h
      WHERE h.device = r.device AND h.ts < r.since AND h.ts >= r.since - INTERVAL '1 hour'
      ORDER BY h.ts DESC LIMIT 1) before
    LEFT JOIN LATERAL (
      SELECT h.ts FROM %2$s h
      WHERE h.device = r.device AND h.ts > r.until AND h.ts <= r.until + INTERVAL '1 hour'
      ORDER BY h.ts LIMIT 1) after ON true
    WHERE after.ts IS NOT NULL OR live.ts <= r.until$query$, device_class, history)
  INTO near USING runs;
  DELETE FROM public.suspect_reading s USING unnest(near) r
  WHERE s.device_class = judge_runs.device_class AND s.device_id = r.device
    AND s.ts >= r.since AND s.ts <= r.last_ts;
  EXECUTE format($query$
    INSERT INTO public.suspect_reading (device_class, device_id, ts, code, detail)
    SELECT %1$L, j.device, (j.r).ts, i.code, i.detail
    FROM (
      SELECT r.device, r.since, h.reading AS r,
             lag(h.reading) OVER (PARTITION BY r.device, r.since ORDER BY (h.reading).ts) AS p
      FROM unnest($1) r
      CROSS JOIN LATERAL (
        SELECT (h.ts, h.kwh, h.soc, h.temp, h.received_at)::public.judged_reading AS reading
        FROM %2$s h
        WHERE h.device = r.device AND h.ts >= r.previous_ts AND h.ts <= r.last_ts) h) j
    JOIN public.%1$s d ON d.%1$s_id = j.device
    JOIN public.plausibility_limit soft ON soft.device_class = %1$L
    CROSS JOIN LATERAL public.implausibilities(
      j.r, j.p, d.energy_kind, d.reporting_interval,
      soft.power_kw_soft, soft.step_kwh_soft, soft.temp_rate_soft, soft.soc_rate_soft) i
    WHERE (j.r).ts >= j.since
    ON CONFLICT DO NOTHING$query$, device_class, history)
  USING near;
  RETURN ARRAY(SELECT r FROM unnest(runs) r
               WHERE (r.device, r.since) NOT IN (SELECT n.device, n.since FROM unnest(near) n)
               ORDER BY r.device, r.since);
END $$;

-- Which of some readings that are in history break a hard limit, by position. In the order of time: one
-- that is to be refused is passed over as the one before the next.
CREATE OR REPLACE FUNCTION implausible_beyond_limits(
  device_class text, devices text[], instants timestamptz[])
RETURNS TABLE ("position" bigint, code text, detail text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
  hard public.plausibility_limit;
  declared record;
  key record;
  previous public.judged_reading;
  refused timestamptz;           -- the last one refused
  before_refused public.judged_reading;
  last_device text;
BEGIN
  SELECT * INTO hard FROM public.plausibility_limit l
  WHERE l.device_class = implausible_beyond_limits.device_class;
  IF num_nonnulls(hard.power_kw_hard, hard.step_kwh_hard, hard.temp_rate_hard, hard.soc_rate_hard) = 0
  THEN
    RETURN;
  END IF;
  FOR key IN
    SELECT k.device, k.ts, k.place
    FROM unnest(devices, instants) WITH ORDINALITY AS k (device, ts, place)
    ORDER BY k.device, k.ts
  LOOP
    IF key.device IS DISTINCT FROM last_device THEN
      last_device := key.device;
      refused := NULL;
      SELECT * INTO declared FROM public.declared_device($1, key.device);
    END IF;
    previous := public.reading_before($1, key.device, key.ts);
    IF previous.ts = refused THEN
      previous := before_refused;
    END IF;
    SELECT key.place, 'implausible_' || i.code, i.detail INTO "position", code, detail
    FROM public.readings_to_judge($1, key.device, key.ts, key.ts) r,
      public.implausibilities(
        r, previous, declared.energy_kind, declared.reporting_interval,
        hard.power_kw_hard, hard.step_kwh_hard, hard.temp_rate_hard, hard.soc_rate_hard) i
    WHERE i.code <> 'clock_offset'
    LIMIT 1;
    IF FOUND THEN
      refused := key.ts;
      before_refused := previous;
      RETURN NEXT;
    END IF;
  END LOOP;
END $$;

-- How many of a device's readings in since <= ts < until are flagged.
CREATE OR REPLACE FUNCTION suspect_count(
  device_class text, device text, since timestamptz, until timestamptz)
RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
BEGIN
  RETURN (SELECT count(DISTINCT s.ts) FROM public.suspect_reading s
          WHERE s.device_class = suspect_count.device_class AND s.device_id = device
            AND s.ts >= since AND s.ts < until);
END $$;
