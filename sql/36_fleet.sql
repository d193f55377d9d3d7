-- The definition behind GET /v1/analytics/fleet: the row of vehicle_performance_v1() for every
-- vehicle, in some statements for the whole fleet. What a row means is shared (30_performance.sql);
-- only how the readings are added up differs: here a statement takes one stretch of the window for
-- all devices, where the answer for one vehicle takes one piece.
--
-- Each device is looked up by the index of (device, ts): that reads the rows it must and no others,
-- however full their chunk is, and compressed chunks give up one device's batches at a time.

-- Pieces of devices, given by arrays, as far as they lie in a stretch of time that is rolled up, or
-- is not. In mid_since .. mid_until the piece is read from the rollup; what is left at its ends, all
-- of it where nothing is rolled up, is read raw.
CREATE OR REPLACE FUNCTION pieces_within(
  devices text[], registers boolean[], sinces timestamptz[], untils timestamptz[],
  stretch_since timestamptz, stretch_until timestamptz, is_rolled boolean)
RETURNS TABLE (piece bigint, device text, is_register boolean, since timestamptz,
               mid_since timestamptz, mid_until timestamptz, until timestamptz)
LANGUAGE sql IMMUTABLE AS $$
  SELECT piece, device, is_register, since, mid_since,
         greatest(mid_since, CASE WHEN is_rolled THEN date_bin('1 hour', until, 'epoch') END), until
  FROM (SELECT piece, device, is_register, since, until,
               CASE WHEN is_rolled
                    THEN least(until, date_bin('1 hour', since + INTERVAL '59:59.999999', 'epoch'))
                    ELSE until END AS mid_since
        FROM (SELECT piece, device, is_register, greatest(since, stretch_since) AS since,
                     least(until, stretch_until) AS until
              FROM unnest(devices, registers, sinces, untils)
                   WITH ORDINALITY p (device, is_register, since, until, piece)) clipped
        WHERE since < until) cut
$$;

-- What each piece measured, part by part: a part is rolled up, or raw, and has no edge of a stretch
-- inside. Parts without readings are left out. Statements are planned for their stretch, so that
-- only its chunks are opened; looking for them again for each device would cost more than reading.
CREATE OR REPLACE FUNCTION fleet_parts(
  device_class text, devices text[], registers boolean[], sinces timestamptz[],
  untils timestamptz[], rolled tstzmultirange, everything tstzmultirange)
RETURNS TABLE (piece bigint, since timestamptz, readings bigint, kwh_sum float8,
               kwh_increase float8, kwh_first float8, kwh_last float8, temp_sum float8)
LANGUAGE plpgsql STABLE
SET jit = off SET timescaledb.enable_runtime_exclusion = off AS $$
DECLARE
  stretch record;
  source record;
  kind record;
BEGIN
  FOR stretch IN
    SELECT lower(r) AS since, upper(r) AS until, true AS is_rolled FROM unnest(rolled) r
    UNION ALL
    SELECT lower(r), upper(r), false FROM unnest(everything - rolled) r
  LOOP
    FOR source IN
      SELECT * FROM (VALUES
        ('meter', true, 'meter_hourly_materialized', 'meter_id', 'hour',
         'readings, kwh_sum, kwh_increase, kwh_first, kwh_last, 0.0::float8'),
        ('vehicle', true, 'vehicle_hourly_materialized', 'vehicle_id', 'hour',
         'readings, kwh_sum, kwh_increase, kwh_first, kwh_last, battery_temp_sum'),
        ('meter', false, 'meter_telemetry_history', 'meter_id', 'ts',
         '1, kwh_consumed_ac, 0.0::float8, kwh_consumed_ac, kwh_consumed_ac, 0.0::float8'),
        ('vehicle', false, 'vehicle_telemetry_history', 'vehicle_id', 'ts',
         '1, kwh_delivered_dc, 0.0::float8, kwh_delivered_dc, kwh_delivered_dc, battery_temp')
      ) AS s (class, is_rolled, relation, id, at, measures)
      WHERE class = device_class AND s.is_rolled <= stretch.is_rolled
    LOOP
      FOR kind IN
        SELECT * FROM (VALUES
          (false, 'NULL::float8, NULL::float8, NULL::float8', ''),
          (true, 'sum(kwh_increase + public.register_step(kwh_first, previous)),'
                 ' max(kwh_first) FILTER (WHERE previous IS NULL),'
                 ' max(kwh_last) FILTER (WHERE next IS NULL)',
           ', lag(kwh_last) OVER (ORDER BY at) AS previous,'
           ' lead(kwh_first) OVER (ORDER BY at) AS next')
        ) AS k (is_register, register_measures, neighbours)
        WHERE is_register = ANY (registers)
      LOOP
        RETURN QUERY EXECUTE format(
          $query$
          SELECT p.piece, part.since, m.*
          FROM public.pieces_within($1, $2, $3, $4, $5, $6, $7) p
          CROSS JOIN LATERAL (VALUES %1$s) AS part (since, until)
          CROSS JOIN LATERAL (
            SELECT sum(readings)::bigint AS readings, sum(kwh_sum), %2$s, sum(temp_sum)
            FROM (SELECT readings, kwh_sum, kwh_increase, kwh_first, kwh_last, temp_sum %3$s
                  FROM (SELECT %4$s, %5$s FROM public.%6$I
                        WHERE %7$I = p.device AND %4$I >= part.since AND %4$I < part.until
                          AND %4$I >= $5 AND %4$I < $6)
                       AS r (at, readings, kwh_sum, kwh_increase, kwh_first, kwh_last, temp_sum)
                 ) s
          ) m
          WHERE p.is_register = $8 AND part.since < part.until AND m.readings > 0
          $query$,
          CASE WHEN source.is_rolled THEN '(p.mid_since, p.mid_until)'
               ELSE '(p.since, p.mid_since), (p.mid_until, p.until)' END,
          kind.register_measures, kind.neighbours,
          source.at, source.measures, source.relation, source.id)
        USING devices, registers, sinces, untils, stretch.since, stretch.until, stretch.is_rolled,
              kind.is_register;
      END LOOP;
    END LOOP;
  END LOOP;
END $$;

-- device_measures() for many pieces at once: a row for each that has readings, by its number in the
-- arrays. A piece without a device is left out.
CREATE OR REPLACE FUNCTION fleet_measures(
  device_class text, devices text[], kinds text[], sinces timestamptz[], untils timestamptz[],
  window_since timestamptz, window_until timestamptz)
RETURNS TABLE (piece bigint, kwh float8, readings bigint, temp_sum float8)
LANGUAGE plpgsql STABLE AS $$
DECLARE
  hour constant interval := INTERVAL '1 hour';
  begin_hour constant timestamptz := date_bin(hour, window_since, 'epoch');
  hours record;              -- which may be read from the rollup, also of the 40 days before
  everything tstzmultirange := tstzmultirange(tstzrange(begin_hour - hour, window_until));
  rolled tstzmultirange;
  p record;                  -- the pieces, and in front of each run of a register an hour or two
BEGIN
  SELECT * INTO hours FROM public.rollup_coverage(
    (device_class || '_hourly')::name, (device_class || '_telemetry_history')::name,
    begin_hour - INTERVAL '40 days', window_until);
  -- Where the window cuts an hour, every device does.
  rolled := public.whole_hours(hours.rolled * tstzmultirange(
    tstzrange(begin_hour - hour, begin_hour), tstzrange(window_since, window_until)));

  PERFORM public.check_edge(device_class, d.device, e.edge, hours.dropped)
  FROM unnest(devices, sinces, untils) d (device, since, until)
  CROSS JOIN LATERAL (VALUES (d.since), (d.until)) e (edge)
  WHERE d.device IS NOT NULL AND e.edge <> date_bin(hour, e.edge, 'epoch')
    AND hours.dropped @> date_bin(hour, e.edge, 'epoch');

  -- A register steps from the reading before. Within a run of pieces that touch, that is known from
  -- the piece before; what lies before a run is looked for in the hour before, and then further back.
  WITH given AS (
    SELECT *, lag(until) OVER device_in_time IS DISTINCT FROM since AS begins
    FROM unnest(devices, kinds, sinces, untils) WITH ORDINALITY
         AS g (device, kind, since, until, number)
    WHERE device IS NOT NULL
    WINDOW device_in_time AS (PARTITION BY device ORDER BY since)
  ), run AS (
    SELECT number, device, kind = 'register' AS is_register, since, until,
           max(since) FILTER (WHERE begins) OVER (PARTITION BY device ORDER BY since) AS run_since
    FROM given
  ), read AS (
    SELECT * FROM run
    UNION ALL
    SELECT NULL, device, true, date_bin(hour, since, 'epoch') - hour, since, run_since
    FROM run WHERE is_register AND since = run_since
    ORDER BY device, since
  )
  SELECT array_agg(number) AS numbers, array_agg(device) AS devices,
         array_agg(is_register) AS registers, array_agg(since) AS sinces,
         array_agg(until) AS untils, array_agg(run_since) AS runs
  INTO p FROM read;

  RETURN QUERY
  WITH part AS (
    SELECT u.number, u.device, u.is_register, u.run_since, f.*
    FROM public.fleet_parts(device_class, p.devices, p.registers, p.sinces, p.untils, rolled,
                            everything) f
    JOIN unnest(p.numbers, p.devices, p.registers, p.runs) WITH ORDINALITY
         AS u (number, device, is_register, run_since, piece) USING (piece)
  ), stepped AS (
    SELECT *, lag(part.kwh_last) OVER (PARTITION BY device, run_since ORDER BY part.since) AS previous
    FROM part
  )
  SELECT s.number,
         sum(CASE WHEN NOT s.is_register THEN s.kwh_sum
                  ELSE s.kwh_increase + public.register_step(s.kwh_first, coalesce(
                    s.previous,
                    public.fleet_before(device_class, s.device, s.run_since, hours.rolled))) END),
         sum(s.readings)::bigint, sum(s.temp_sum)
  FROM stepped s
  WHERE s.number IS NOT NULL
  GROUP BY s.number;
END $$;

-- register_before(), where the hour before an instant's hour is known to hold nothing: mostly the
-- rollup knows, if it is clean from there on back.
CREATE OR REPLACE FUNCTION fleet_before(
  device_class text, device text, instant timestamptz, rolled tstzmultirange)
RETURNS float8
LANGUAGE plpgsql STABLE AS $$
DECLARE
  reached constant timestamptz :=
    date_bin(INTERVAL '1 hour', instant, 'epoch') - INTERVAL '1 hour';
  clean tstzrange;
  kwh float8;
BEGIN
  SELECT r INTO clean FROM unnest(rolled) r WHERE r @> reached - INTERVAL '1 microsecond';
  IF device_class = 'meter' THEN
    SELECT h.kwh_last INTO kwh FROM public.meter_hourly_materialized h
    WHERE h.meter_id = device AND h.hour >= lower(clean) AND h.hour < reached
    ORDER BY h.hour DESC LIMIT 1;
  ELSE
    SELECT h.kwh_last INTO kwh FROM public.vehicle_hourly_materialized h
    WHERE h.vehicle_id = device AND h.hour >= lower(clean) AND h.hour < reached
    ORDER BY h.hour DESC LIMIT 1;
  END IF;
  RETURN coalesce(kwh, public.register_before(device_class, device, instant));
END $$;

-- The windows of all vehicles, cut where their assignments begin and end, are kept as arrays: both
-- classes are measured by them, and a STABLE function may not make a table.
CREATE OR REPLACE FUNCTION fleet_performance_v1(since timestamptz, until timestamptz)
RETURNS SETOF vehicle_performance
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
  window_since ALIAS FOR $1;
  window_until ALIAS FOR $2;
  raw_store constant bigint := public.raw_store_version();
  p record;
BEGIN
  PERFORM public.check_window(window_since, window_until);
  WITH assigned AS (
    SELECT a.vehicle_id, greatest(lower(a.during), window_since) AS since,
           least(coalesce(upper(a.during), 'infinity'), window_until) AS until,
           m.meter_id, m.energy_kind, extract(epoch FROM m.reporting_interval)::float8 AS seconds
    FROM public.charging_assignment a JOIN public.meter m USING (meter_id)
    WHERE a.during && tstzrange(window_since, window_until)
  ), metered AS (
    SELECT a.vehicle_id, range_agg(tstzrange(a.since, a.until)) AS during
    FROM assigned a GROUP BY a.vehicle_id
  ), piece AS (
    SELECT a.vehicle_id, a.since, a.until, a.meter_id, a.energy_kind, a.seconds FROM assigned a
    UNION ALL
    SELECT v.vehicle_id, lower(r), upper(r), NULL, NULL, NULL
    FROM public.vehicle v LEFT JOIN metered a USING (vehicle_id)
    CROSS JOIN LATERAL unnest(tstzmultirange(tstzrange(window_since, window_until))
                              - coalesce(a.during, '{}')) r
  )
  SELECT array_agg(o.vehicle_id) AS vehicles, array_agg(o.vehicle_kind) AS vehicle_kinds,
         array_agg(o.since) AS sinces, array_agg(o.until) AS untils,
         array_agg(o.meter_id) AS meters, array_agg(o.energy_kind) AS meter_kinds,
         array_agg(extract(epoch FROM o.until - o.since)::float8 / o.seconds) AS promised
  INTO p
  FROM (SELECT q.*, v.energy_kind AS vehicle_kind
        FROM piece q JOIN public.vehicle v USING (vehicle_id)
        ORDER BY q.vehicle_id, q.since) o;

  RETURN QUERY
  WITH measured AS (
    SELECT u.vehicle_id,
           sum(coalesce(ac.kwh, 0)) FILTER (WHERE u.meter_id IS NOT NULL) AS ac_kwh,
           sum(coalesce(dc.kwh, 0)) AS dc_kwh,
           coalesce(sum(dc.kwh) FILTER (WHERE u.meter_id IS NOT NULL), 0) AS metered_kwh,
           coalesce(sum(ac.readings), 0)::bigint AS ac_readings,
           coalesce(sum(dc.readings), 0)::bigint AS dc_readings,
           sum(dc.temp_sum) AS temp_sum,
           sum(u.promised) AS ac_promised
    FROM unnest(p.vehicles, p.meters, p.promised) WITH ORDINALITY
         AS u (vehicle_id, meter_id, promised, piece)
    LEFT JOIN public.fleet_measures('vehicle', p.vehicles, p.vehicle_kinds, p.sinces, p.untils,
                                    window_since, window_until) dc USING (piece)
    LEFT JOIN public.fleet_measures('meter', p.meters, p.meter_kinds, p.sinces, p.untils,
                                    window_since, window_until) ac USING (piece)
    GROUP BY u.vehicle_id
  ), suspect AS (
    SELECT f.vehicle_id, count(*) AS readings
    FROM (SELECT DISTINCT s.device_id AS vehicle_id, NULL AS meter_id, s.ts
          FROM public.suspect_reading s
          WHERE s.device_class = 'vehicle' AND s.ts >= window_since AND s.ts < window_until
          UNION ALL
          SELECT DISTINCT u.vehicle_id, u.meter_id, s.ts
          FROM public.suspect_reading s
          JOIN unnest(p.vehicles, p.meters, p.sinces, p.untils)
               AS u (vehicle_id, meter_id, since, until)
            ON s.device_id = u.meter_id AND s.ts >= u.since AND s.ts < u.until
          WHERE s.device_class = 'meter' AND s.ts >= window_since AND s.ts < window_until) f
    GROUP BY f.vehicle_id
  ), judged AS (
    SELECT m.*, public.float_ratio(m.metered_kwh, m.ac_kwh) AS ratio,
           public.reading_coverage(m.ac_readings, m.ac_promised) AS ac_coverage,
           public.reading_coverage(m.dc_readings * extract(epoch FROM v.reporting_interval)::float8,
                           extract(epoch FROM window_until - window_since)::float8) AS dc_coverage
    FROM measured m JOIN public.vehicle v USING (vehicle_id)
  )
  SELECT j.vehicle_id, window_since, window_until, j.ac_kwh, j.dc_kwh, j.ratio,
         j.temp_sum / nullif(j.dc_readings, 0), j.metered_kwh, j.ac_readings, j.dc_readings,
         j.ac_coverage, j.dc_coverage,
         public.performance_verdict(j.ac_kwh, j.metered_kwh, j.ratio, j.ac_coverage, j.dc_coverage),
         coalesce(s.readings, 0)
  FROM judged j LEFT JOIN suspect s USING (vehicle_id);
  PERFORM public.check_raw_store(raw_store);
END $$;
