-- The definition behind GET /v1/analytics/performance/{vehicleId}.
--
-- A STABLE function runs all its statements in the snapshot of the statement that calls it, so the
-- parts of an answer belong together even while readings arrive and rollups are refreshed. Where
-- raw chunks are stored otherwise meanwhile, it raises serialization_failure: ask again.

CREATE OR REPLACE FUNCTION vehicle_performance_v1(
  vehicle_id text, since timestamptz, until timestamptz)
RETURNS SETOF vehicle_performance
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RETURN QUERY SELECT p.* FROM public.vehicle_performances($1, ARRAY[$2], $3) p;
END $$;

-- The same of consecutive windows, which begin at `edges`, in their order, and end together with the
-- last of them: one row each, none at all for a vehicle that was never declared, assigned or heard. What is
-- clean is asked once.
CREATE OR REPLACE FUNCTION vehicle_performances(
  vehicle text, edges timestamptz[], until timestamptz)
RETURNS SETOF vehicle_performance
LANGUAGE plpgsql STABLE AS $$
DECLARE
  device record;          -- of the vehicle: its kind and its interval in seconds
  vehicle_hours record;   -- which hours of its rollup may be read
  meter_hours record;
BEGIN
  PERFORM public.check_window(edges[1], until);
  SELECT v.energy_kind, extract(epoch FROM v.reporting_interval)::float8 AS interval_seconds
  INTO device
  FROM public.vehicle v WHERE v.vehicle_id = vehicle;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  SELECT * INTO vehicle_hours FROM public.rollup_coverage(
    'vehicle_hourly', 'vehicle_telemetry_history', edges[1], until);
  SELECT * INTO meter_hours FROM public.rollup_coverage(
    'meter_hourly', 'meter_telemetry_history', edges[1], until);
  FOR i IN 1 .. cardinality(edges) LOOP
    RETURN NEXT public.measure_vehicle(
      vehicle, device.energy_kind, device.interval_seconds,
      edges[i], coalesce(edges[i + 1], until),
      vehicle_hours.rolled, vehicle_hours.dropped, meter_hours.rolled, meter_hours.dropped);
  END LOOP;
  PERFORM public.check_raw_store(
    public.raw_store_version(edges[1], until), edges[1], until);
END $$;

CREATE OR REPLACE FUNCTION measure_vehicle(
  vehicle text, energy_kind text, interval_seconds float8,
  window_since timestamptz, window_until timestamptz,
  vehicle_rolled tstzmultirange, vehicle_dropped tstzmultirange,
  meter_rolled tstzmultirange, meter_dropped tstzmultirange)
RETURNS vehicle_performance
LANGUAGE plpgsql STABLE AS $$
DECLARE
  answer public.vehicle_performance;
  piece record;           -- a stretch of the window with one meter, or with none
  dc record;
  ac record;
  temp_sum float8 := 0;
  ac_promised float8 := 0;
  ac_readings bigint := 0;
BEGIN
  answer.vehicle_id := vehicle;
  answer.since := window_since;
  answer.until := window_until;
  answer.total_kwh_delivered_dc := 0;
  answer.metered_kwh_delivered_dc := 0;
  answer.dc_readings := 0;
  answer.suspect_readings := public.suspect_count('vehicle', vehicle, window_since, window_until);
  FOR piece IN SELECT * FROM public.assigned_pieces(vehicle, window_since, window_until) LOOP
    dc := public.device_measures('vehicle', vehicle, energy_kind, piece.since, piece.until,
                                 vehicle_rolled, vehicle_dropped);
    answer.total_kwh_delivered_dc := answer.total_kwh_delivered_dc + dc.kwh;
    answer.dc_readings := answer.dc_readings + dc.readings;
    temp_sum := temp_sum + dc.temp_sum;
    IF piece.meter_id IS NOT NULL THEN
      ac := public.device_measures('meter', piece.meter_id, piece.energy_kind, piece.since,
                                   piece.until, meter_rolled, meter_dropped);
      answer.metered_kwh_delivered_dc := answer.metered_kwh_delivered_dc + dc.kwh;
      answer.total_kwh_consumed_ac := coalesce(answer.total_kwh_consumed_ac, 0) + ac.kwh;
      ac_readings := ac_readings + ac.readings;
      answer.suspect_readings := answer.suspect_readings
        + public.suspect_count('meter', piece.meter_id, piece.since, piece.until);
      ac_promised := ac_promised
        + extract(epoch FROM piece.until - piece.since)::float8 / piece.interval_seconds;
    END IF;
  END LOOP;
  answer.ac_readings := ac_readings;
  answer.average_battery_temp := temp_sum / nullif(answer.dc_readings, 0);
  answer.efficiency_ratio :=
    public.float_ratio(answer.metered_kwh_delivered_dc, answer.total_kwh_consumed_ac);
  answer.dc_coverage := public.reading_coverage(answer.dc_readings * interval_seconds,
    extract(epoch FROM window_until - window_since)::float8);
  answer.ac_coverage := public.reading_coverage(ac_readings, ac_promised);
  answer.verdict := public.performance_verdict(
    answer.total_kwh_consumed_ac, answer.metered_kwh_delivered_dc, answer.efficiency_ratio,
    answer.ac_coverage, answer.dc_coverage);
  RETURN answer;
END $$;

-- What the answers for one vehicle and for the fleet share.

CREATE OR REPLACE FUNCTION check_window(since timestamptz, until timestamptz) RETURNS void
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
  IF (since < until AND isfinite(since) AND isfinite(until)) IS NOT TRUE THEN
    RAISE EXCEPTION 'since must be before until, and both must be instants'
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
END $$;

-- What was reported of what was promised, at most 1; 0 where nothing was.
CREATE OR REPLACE FUNCTION reading_coverage(reported float8, promised float8) RETURNS float8
LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN promised > 0 THEN least(1, reported / promised) ELSE 0 END
$$;

-- The first that applies.
CREATE OR REPLACE FUNCTION performance_verdict(
  ac_kwh float8, metered_dc_kwh float8, ratio float8, ac_coverage float8, dc_coverage float8)
RETURNS text
LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE
    WHEN ac_kwh IS NULL THEN 'no_meter'
    WHEN least(ac_coverage, dc_coverage) < 0.9 THEN 'insufficient_data'
    WHEN ratio > 1 THEN 'above_one'
    WHEN ratio IS NULL AND metered_dc_kwh > ac_kwh THEN 'above_one'
    WHEN ratio < 0.85 THEN 'below_threshold'
    ELSE 'ok' END
$$;

-- A quotient of two figures that are not negative; NULL where there is none, or none that a float8
-- can hold, and 0 below the smallest. PostgreSQL would raise an error for the last two.
CREATE OR REPLACE FUNCTION float_ratio(dividend float8, divisor float8) RETURNS float8
LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN divisor IS NULL OR divisor = 0 THEN NULL
              WHEN dividend = 0 THEN 0
              WHEN ln(dividend) - ln(divisor) > 709 THEN NULL
              WHEN ln(dividend) - ln(divisor) < -708 THEN 0
              ELSE dividend / divisor END
$$;

-- The window of a vehicle, cut where its assignments begin and end; meter_id is NULL where it hung
-- on none. With the meter's kind and its interval in seconds.
CREATE OR REPLACE FUNCTION assigned_pieces(
  vehicle text, window_since timestamptz, window_until timestamptz)
RETURNS TABLE (since timestamptz, until timestamptz, meter_id text, energy_kind text,
               interval_seconds float8)
LANGUAGE plpgsql STABLE AS $$
DECLARE
  assignment record;
  reached timestamptz := window_since;
BEGIN
  FOR assignment IN
    SELECT greatest(lower(a.during), window_since) AS since,
           least(coalesce(upper(a.during), 'infinity'), window_until) AS until,
           m.meter_id, m.energy_kind, extract(epoch FROM m.reporting_interval)::float8 AS seconds
    FROM public.charging_assignment a JOIN public.meter m USING (meter_id)
    WHERE a.vehicle_id = vehicle AND a.during && tstzrange(window_since, window_until)
    ORDER BY 1
  LOOP
    IF reached < assignment.since THEN
      RETURN QUERY SELECT reached, assignment.since, NULL::text, NULL::text, NULL::float8;
    END IF;
    RETURN QUERY SELECT assignment.since, assignment.until, assignment.meter_id,
                        assignment.energy_kind, assignment.seconds;
    reached := assignment.until;
  END LOOP;
  IF reached < window_until THEN
    RETURN QUERY SELECT reached, window_until, NULL::text, NULL::text, NULL::float8;
  END IF;
END $$;
