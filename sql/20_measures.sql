-- What one device measured between two instants: the building block of every answer.
--
-- Simple statements with direct bounds, in PL/pgSQL, are what keeps an answer fast. What reads raw
-- rows is planned for its own bounds each time, so that only the chunks it needs are opened: a
-- cached plan locks every chunk there is. What reads the rollup, with its few chunks, keeps its
-- plan.
--
-- `device_class` is 'meter' or 'vehicle'. A register's readings are stepped through in a loop: a
-- window function over them would merge all chunks.

-- From the raw rows.
CREATE OR REPLACE FUNCTION raw_measures(
  device_class text, device text, energy_kind text, since timestamptz, until timestamptz)
RETURNS piece_measures
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
  m public.piece_measures;
  kwh float8;
  temp float8;
BEGIN
  IF energy_kind <> 'register' THEN
    IF device_class = 'meter' THEN
      SELECT count(*), sum(h.kwh_consumed_ac), 0.0 INTO m.readings, m.kwh_sum, m.temp_sum
      FROM public.meter_telemetry_history h
      WHERE h.meter_id = device AND h.ts >= since AND h.ts < until;
    ELSE
      SELECT count(*), sum(h.kwh_delivered_dc), sum(h.battery_temp)
      INTO m.readings, m.kwh_sum, m.temp_sum
      FROM public.vehicle_telemetry_history h
      WHERE h.vehicle_id = device AND h.ts >= since AND h.ts < until;
    END IF;
    RETURN m;
  END IF;
  m.readings := 0;
  m.kwh_increase := 0;
  m.temp_sum := 0;
  IF device_class = 'meter' THEN
    FOR kwh IN
      SELECT h.kwh_consumed_ac FROM public.meter_telemetry_history h
      WHERE h.meter_id = device AND h.ts >= since AND h.ts < until ORDER BY h.ts
    LOOP
      m.readings := m.readings + 1;
      m.kwh_first := coalesce(m.kwh_first, kwh);
      m.kwh_increase := m.kwh_increase + public.register_step(kwh, m.kwh_last);
      m.kwh_last := kwh;
    END LOOP;
  ELSE
    FOR kwh, temp IN
      SELECT h.kwh_delivered_dc, h.battery_temp FROM public.vehicle_telemetry_history h
      WHERE h.vehicle_id = device AND h.ts >= since AND h.ts < until ORDER BY h.ts
    LOOP
      m.readings := m.readings + 1;
      m.kwh_first := coalesce(m.kwh_first, kwh);
      m.kwh_increase := m.kwh_increase + public.register_step(kwh, m.kwh_last);
      m.kwh_last := kwh;
      m.temp_sum := m.temp_sum + temp;
    END LOOP;
  END IF;
  RETURN m;
END $$;

-- From whole rolled-up hours.
CREATE OR REPLACE FUNCTION rolled_measures(
  device_class text, device text, energy_kind text, since timestamptz, until timestamptz)
RETURNS piece_measures
LANGUAGE plpgsql STABLE AS $$
DECLARE
  m public.piece_measures;
BEGIN
  -- The rollup has many chunks in the end, so plans are made for the window here, too: the less there
  -- is to plan, the better.
  IF energy_kind <> 'register' THEN
    IF device_class = 'meter' THEN
      SELECT sum(readings), sum(kwh_sum), 0.0 INTO m.readings, m.kwh_sum, m.temp_sum
      FROM public.meter_hourly_materialized
      WHERE meter_id = device AND hour >= since AND hour < until;
    ELSE
      SELECT sum(readings), sum(kwh_sum), sum(battery_temp_sum)
      INTO m.readings, m.kwh_sum, m.temp_sum
      FROM public.vehicle_hourly_materialized
      WHERE vehicle_id = device AND hour >= since AND hour < until;
    END IF;
    RETURN m;
  END IF;
  IF device_class = 'meter' THEN
    SELECT sum(readings), sum(kwh_sum), sum(kwh_increase + step),
           public.first(kwh_first, hour), public.last(kwh_last, hour), 0.0 INTO m
    FROM (SELECT hour, readings, kwh_sum, kwh_increase, kwh_first, kwh_last,
                 public.register_step(kwh_first, lag(kwh_last) OVER (ORDER BY hour)) AS step
          FROM public.meter_hourly_materialized
          WHERE meter_id = device AND hour >= since AND hour < until) h;
  ELSE
    SELECT sum(readings), sum(kwh_sum), sum(kwh_increase + step),
           public.first(kwh_first, hour), public.last(kwh_last, hour), sum(battery_temp_sum) INTO m
    FROM (SELECT hour, readings, kwh_sum, kwh_increase, kwh_first, kwh_last, battery_temp_sum,
                 public.register_step(kwh_first, lag(kwh_last) OVER (ORDER BY hour)) AS step
          FROM public.vehicle_hourly_materialized
          WHERE vehicle_id = device AND hour >= since AND hour < until) h;
  END IF;
  RETURN m;
END $$;
DROP FUNCTION IF EXISTS rolled_measures(text, text, timestamptz, timestamptz);

-- The kWh of the device's last reading before an instant, NULL where there is none: what a register
-- steps from. Searched backwards in bounded steps, because an unbounded search opens every chunk:
-- in the raw rows of ten days, then in the rollup. What the rollup says of an hour counts only where
-- no raw row may say otherwise: dirty hours, back to the one that it found, are looked up raw. What was
-- searched is not the caller's window, so this sees to it that the store stood still there.
CREATE OR REPLACE FUNCTION register_before(device_class text, device text, instant timestamptz)
RETURNS float8
LANGUAGE plpgsql STABLE AS $$
DECLARE
  reach interval;
  since timestamptz;
  until timestamptz := instant;
  found_kwh float8;
BEGIN
  FOREACH reach IN ARRAY ARRAY[INTERVAL '1 hour', INTERVAL '1 day', INTERVAL '10 days'] LOOP
    since := instant - reach;
    found_kwh := public.raw_before(device_class, device, since, until);
    IF found_kwh IS NOT NULL THEN
      PERFORM public.check_raw_store(
        public.raw_store_version(since, instant), since, instant);
      RETURN found_kwh;
    END IF;
    until := since;
  END LOOP;
  found_kwh := public.register_long_before(device_class, device, instant, until);
  PERFORM public.check_raw_store(public.raw_store_version());
  RETURN found_kwh;
END $$;

-- The same, where the raw rows down to `searched` are known to hold none.
CREATE OR REPLACE FUNCTION register_long_before(
  device_class text, device text, instant timestamptz, searched timestamptz)
RETURNS float8
LANGUAGE plpgsql STABLE AS $$
DECLARE
  since timestamptz;
  until timestamptz;
  reached timestamptz := searched;  -- raw rows are searched down to here
  found_kwh float8;
  rolled record;                    -- the newest hour of the rollup that is not ruled out yet
  dirty tstzmultirange;
  piece tstzrange;
BEGIN
  -- An hour that the instant cuts has been searched above, or cannot be answered at all.
  until := instant;
  LOOP
    rolled := public.rolled_before(device_class, device, instant, until);
    since := coalesce(rolled.hour, '-infinity');
    IF since < reached THEN
      dirty := public.raw_dirty_hours(device_class, since, reached);
      FOR piece IN SELECT r FROM unnest(dirty) r ORDER BY lower(r) DESC LOOP
        found_kwh := public.raw_before(device_class, device, lower(piece), upper(piece));
        IF found_kwh IS NOT NULL THEN
          RETURN found_kwh;
        END IF;
      END LOOP;
      reached := since;
    ELSE
      dirty := public.raw_dirty_hours(device_class, since, since + INTERVAL '1 hour');
    END IF;
    IF rolled.hour IS NULL OR NOT dirty @> rolled.hour THEN
      RETURN rolled.kwh;
    END IF;
    -- All that it held was taken out by corrections, and perhaps all of the hours before it.
    SELECT r INTO piece FROM unnest(public.raw_dirty_hours(
      device_class, since - INTERVAL '40 days', since + INTERVAL '1 hour')) r WHERE r @> since;
    found_kwh := public.raw_before(device_class, device, lower(piece), since);
    IF found_kwh IS NOT NULL THEN
      RETURN found_kwh;
    END IF;
    until := lower(piece);
    reached := least(reached, until);
  END LOOP;
END $$;

-- The newest hour of a device's rollup before `until` whose last reading is before an instant; the hour
-- is NULL where there is none. Planned for its bounds: a cached plan cannot know how far they reach, and may
-- walk through the hours of all devices.
CREATE OR REPLACE FUNCTION rolled_before(
  device_class text, device text, instant timestamptz, until timestamptz,
  OUT hour timestamptz, OUT kwh float8)
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
  reach interval;
  since timestamptz;
BEGIN
  FOREACH reach IN ARRAY ARRAY[INTERVAL '40 days', INTERVAL '400 days', NULL] LOOP
    since := coalesce(until - reach, '-infinity');
    IF device_class = 'meter' THEN
      SELECT h.hour, h.kwh_last INTO hour, kwh
      FROM public.meter_hourly_materialized h
      WHERE h.meter_id = device AND h.hour >= since AND h.hour < until AND h.ts_last < instant
      ORDER BY h.hour DESC LIMIT 1;
    ELSE
      SELECT h.hour, h.kwh_last INTO hour, kwh
      FROM public.vehicle_hourly_materialized h
      WHERE h.vehicle_id = device AND h.hour >= since AND h.hour < until AND h.ts_last < instant
      ORDER BY h.hour DESC LIMIT 1;
    END IF;
    EXIT WHEN hour IS NOT NULL;
  END LOOP;
END $$;

-- The hours between two instants that have raw rows and that the rollup does not, or not rightly, hold.
CREATE OR REPLACE FUNCTION raw_dirty_hours(
  device_class text, since timestamptz, until timestamptz)
RETURNS tstzmultirange
LANGUAGE plpgsql STABLE AS $$
DECLARE
  chunks constant tstzmultirange := public.raw_chunk_ranges(
    (device_class || '_telemetry_history')::name, since, until);
BEGIN
  IF isempty(chunks) THEN
    RETURN '{}';
  END IF;
  RETURN chunks * public.rollup_dirty_hours(
    (device_class || '_hourly')::name, lower(chunks), upper(chunks));
END $$;

-- The kWh of the device's last raw reading in since <= ts < until.
CREATE OR REPLACE FUNCTION raw_before(
  device_class text, device text, since timestamptz, until timestamptz)
RETURNS float8
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_custom_plan AS $$
DECLARE
  kwh float8;
BEGIN
  IF device_class = 'meter' THEN
    SELECT h.kwh_consumed_ac INTO kwh FROM public.meter_telemetry_history h
    WHERE h.meter_id = device AND h.ts >= since AND h.ts < until ORDER BY h.ts DESC LIMIT 1;
  ELSE
    SELECT h.kwh_delivered_dc INTO kwh FROM public.vehicle_telemetry_history h
    WHERE h.vehicle_id = device AND h.ts >= since AND h.ts < until ORDER BY h.ts DESC LIMIT 1;
  END IF;
  RETURN kwh;
END $$;

-- An edge inside an hour whose raw rows are dropped cannot be answered, if the device has readings
-- in that hour: the rollup only knows the hour as a whole.
CREATE OR REPLACE FUNCTION check_edge(
  device_class text, device text, edge timestamptz, dropped tstzmultirange)
RETURNS void
LANGUAGE plpgsql STABLE AS $$
DECLARE
  cut timestamptz := date_bin(INTERVAL '1 hour', edge, 'epoch');
  readings bigint;
BEGIN
  IF edge = cut OR NOT dropped @> cut THEN
    RETURN;
  END IF;
  IF device_class = 'meter' THEN
    SELECT h.readings INTO readings FROM public.meter_hourly_materialized h
    WHERE h.meter_id = device AND h.hour = cut;
  ELSE
    SELECT h.readings INTO readings FROM public.vehicle_hourly_materialized h
    WHERE h.vehicle_id = device AND h.hour = cut;
  END IF;
  IF readings > 0 THEN
    RAISE EXCEPTION USING
      ERRCODE = 'ENR01',
      MESSAGE = format('the raw readings of %s %s around %s are past their retention',
                       device_class, device, edge),
      DETAIL = to_char(public.oldest_cut() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
      HINT = 'Begin and end the window, and the assignment, at a whole UTC hour, or later.';
  END IF;
END $$;

-- The oldest instant that a window of any vehicle may cut inside an hour: from here on both
-- classes have raw rows. A class that has none at all can be cut from its rollup's end on.
CREATE OR REPLACE FUNCTION oldest_cut() RETURNS timestamptz
LANGUAGE sql STABLE AS $$
  SELECT max(coalesce(
    lower(public.raw_chunk_ranges(
      (c.class || '_telemetry_history')::name, '-infinity', 'infinity')),
    (SELECT max(lowest) FROM public.rollup_dirty_ranges(
       (c.class || '_hourly')::name, '-infinity', 'infinity'))))
  FROM (VALUES ('meter'), ('vehicle')) AS c (class)
$$;

-- Energy, readings and temperature of one device in since <= ts < until.
CREATE OR REPLACE FUNCTION device_measures(
  device_class text, device text, energy_kind text, since timestamptz, until timestamptz,
  rolled tstzmultirange, dropped tstzmultirange,
  OUT kwh float8, OUT readings bigint, OUT temp_sum float8)
LANGUAGE plpgsql STABLE AS $$
DECLARE
  span tstzmultirange := tstzmultirange(tstzrange(since, until));
  rolled_hours tstzmultirange := public.whole_hours(rolled * span);
  piece record;
  m public.piece_measures;
  previous_kwh float8;
BEGIN
  kwh := 0;
  readings := 0;
  temp_sum := 0;
  PERFORM public.check_edge(device_class, device, since, dropped);
  PERFORM public.check_edge(device_class, device, until, dropped);
  IF energy_kind = 'register' THEN
    previous_kwh := public.register_before(device_class, device, since);
  END IF;
  FOR piece IN
    SELECT lower(r) AS lo, upper(r) AS hi, true AS is_rolled FROM unnest(rolled_hours) r
    UNION ALL
    SELECT lower(r), upper(r), false FROM unnest(span - rolled_hours) r
    ORDER BY lo
  LOOP
    IF piece.is_rolled THEN
      m := public.rolled_measures(device_class, device, energy_kind, piece.lo, piece.hi);
    ELSE
      m := public.raw_measures(device_class, device, energy_kind, piece.lo, piece.hi);
    END IF;
    IF m.readings > 0 THEN
      readings := readings + m.readings;
      temp_sum := temp_sum + m.temp_sum;
      IF energy_kind = 'register' THEN
        kwh := kwh + public.register_step(m.kwh_first, previous_kwh) + m.kwh_increase;
        previous_kwh := m.kwh_last;
      ELSE
        kwh := kwh + m.kwh_sum;
      END IF;
    END IF;
  END LOOP;
END $$;

-- A multirange of whole hours, cut by a window that may not be: keep what is still whole. In PL/pgSQL,
-- because it keeps its plan: in SQL it would be planned at each call.
CREATE OR REPLACE FUNCTION whole_hours(ranges tstzmultirange) RETURNS tstzmultirange
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
  RETURN (
    SELECT coalesce(range_agg(tstzrange(lo, hi)) FILTER (WHERE lo < hi), '{}')
    FROM (SELECT CASE WHEN date_bin('1 hour', lower(r), 'epoch') = lower(r) THEN lower(r)
                      ELSE date_bin('1 hour', lower(r), 'epoch') + INTERVAL '1 hour' END AS lo,
                 date_bin('1 hour', upper(r), 'epoch') AS hi
          FROM unnest(ranges) r) h);
END $$;
