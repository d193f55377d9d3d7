-- What one device measured between two instants: the building block of every answer.
--
-- Simple statements with direct bounds, in PL/pgSQL, are what keeps an answer fast: each has one
-- cached plan whose chunks are excluded once, at start. One large statement locks and excludes every
-- chunk at run time.
--
-- `device_class` is 'meter' or 'vehicle'.

-- From the raw rows.
CREATE OR REPLACE FUNCTION raw_measures(
  device_class text, device text, since timestamptz, until timestamptz)
RETURNS piece_measures
LANGUAGE plpgsql STABLE AS $$
DECLARE
  m public.piece_measures;
BEGIN
  IF device_class = 'meter' THEN
    SELECT count(*), sum(kwh), sum(step), public.first(kwh, ts), public.last(kwh, ts), 0.0 INTO m
    FROM (SELECT ts, kwh_consumed_ac AS kwh,
                 public.register_step(kwh_consumed_ac, lag(kwh_consumed_ac) OVER (ORDER BY ts)) AS step
          FROM public.meter_telemetry_history
          WHERE meter_id = device AND ts >= since AND ts < until) r;
  ELSE
    SELECT count(*), sum(kwh), sum(step), public.first(kwh, ts), public.last(kwh, ts), sum(battery_temp) INTO m
    FROM (SELECT ts, kwh_delivered_dc AS kwh, battery_temp,
                 public.register_step(kwh_delivered_dc, lag(kwh_delivered_dc) OVER (ORDER BY ts)) AS step
          FROM public.vehicle_telemetry_history
          WHERE vehicle_id = device AND ts >= since AND ts < until) r;
  END IF;
  RETURN m;
END $$;

-- From whole rolled-up hours.
CREATE OR REPLACE FUNCTION rolled_measures(
  device_class text, device text, since timestamptz, until timestamptz)
RETURNS piece_measures
LANGUAGE plpgsql STABLE AS $$
DECLARE
  m public.piece_measures;
BEGIN
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

-- The kWh of the device's last reading before an instant, NULL where there is none: what a register
-- steps from. Searched backwards in bounded steps, because an unbounded search opens every chunk.
-- Beyond ten days the rollup names a reading; it may be dirty, so anything raw after that still wins.
CREATE OR REPLACE FUNCTION register_before(device_class text, device text, instant timestamptz)
RETURNS float8
LANGUAGE plpgsql STABLE AS $$
DECLARE
  reach interval;
  until timestamptz := instant;
  since timestamptz;
  found_kwh float8;
  rolled_ts timestamptz;
  rolled_kwh float8;
BEGIN
  FOREACH reach IN ARRAY ARRAY[INTERVAL '1 hour', INTERVAL '1 day', INTERVAL '10 days'] LOOP
    since := instant - reach;
    IF device_class = 'meter' THEN
      SELECT kwh_consumed_ac INTO found_kwh FROM public.meter_telemetry_history
      WHERE meter_id = device AND ts >= since AND ts < until ORDER BY ts DESC LIMIT 1;
    ELSE
      SELECT kwh_delivered_dc INTO found_kwh FROM public.vehicle_telemetry_history
      WHERE vehicle_id = device AND ts >= since AND ts < until ORDER BY ts DESC LIMIT 1;
    END IF;
    IF found_kwh IS NOT NULL THEN
      RETURN found_kwh;
    END IF;
    until := since;
  END LOOP;

  -- An hour that `until` cuts is left out here; if raw rows of it exist they are found below.
  IF device_class = 'meter' THEN
    SELECT kwh_last, ts_last INTO rolled_kwh, rolled_ts FROM public.meter_hourly_materialized
    WHERE meter_id = device AND hour < instant AND ts_last < instant ORDER BY hour DESC LIMIT 1;
    SELECT kwh_consumed_ac INTO found_kwh FROM public.meter_telemetry_history
    WHERE meter_id = device AND ts > coalesce(rolled_ts, '-infinity') AND ts < until
    ORDER BY ts DESC LIMIT 1;
  ELSE
    SELECT kwh_last, ts_last INTO rolled_kwh, rolled_ts FROM public.vehicle_hourly_materialized
    WHERE vehicle_id = device AND hour < instant AND ts_last < instant ORDER BY hour DESC LIMIT 1;
    SELECT kwh_delivered_dc INTO found_kwh FROM public.vehicle_telemetry_history
    WHERE vehicle_id = device AND ts > coalesce(rolled_ts, '-infinity') AND ts < until
    ORDER BY ts DESC LIMIT 1;
  END IF;
  RETURN coalesce(found_kwh, rolled_kwh);
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
      DETAIL = (SELECT to_char(min(r.chunk_start) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
                FROM public.oldest_raw(device_class) AS r(chunk_start)),
      HINT = 'Begin and end the window, and the assignment, at a whole UTC hour, or later.';
  END IF;
END $$;

CREATE OR REPLACE FUNCTION oldest_raw(device_class text) RETURNS timestamptz
LANGUAGE sql STABLE AS $$
  SELECT _timescaledb_functions.to_timestamp(min(s.range_start))
  FROM _timescaledb_catalog.hypertable h
  JOIN _timescaledb_catalog.dimension d ON d.hypertable_id = h.id
  JOIN _timescaledb_catalog.dimension_slice s ON s.dimension_id = d.id
  WHERE h.schema_name = 'public' AND h.table_name = device_class || '_telemetry_history'
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
      m := public.rolled_measures(device_class, device, piece.lo, piece.hi);
    ELSE
      m := public.raw_measures(device_class, device, piece.lo, piece.hi);
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

-- A multirange of whole hours, cut by a window that may not be: keep what is still whole.
CREATE OR REPLACE FUNCTION whole_hours(ranges tstzmultirange) RETURNS tstzmultirange
LANGUAGE sql IMMUTABLE AS $$
  SELECT coalesce(range_agg(tstzrange(lo, hi)) FILTER (WHERE lo < hi), '{}')
  FROM (SELECT CASE WHEN date_bin('1 hour', lower(r), 'epoch') = lower(r) THEN lower(r)
                    ELSE date_bin('1 hour', lower(r), 'epoch') + INTERVAL '1 hour' END AS lo,
               date_bin('1 hour', upper(r), 'epoch') AS hi
        FROM unnest(ranges) r) h
$$;
