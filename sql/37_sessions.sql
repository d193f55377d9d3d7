-- The definition behind GET /v1/analytics/sessions/{vehicleId}: when a vehicle charged, and what each
-- time gave, found from its readings and the ledger.
--
-- A reading charges if it has energy: a kWh over 0, for a register a step over 0. It speaks of the
-- time since the reading before it, so charging begins there; where that one is longer ago than the
-- longest pause, nobody knows when it began, and the reading's own instant is taken. Never does it
-- begin before the assignment that the reading belongs to. Readings that charge are one session as
-- long as what lies between them is no longer than the pause: three reporting intervals of the
-- vehicle, at least ten minutes. A session hangs on one meter, or on none: it ends with the assignment.
--
-- The figures of a session are those of vehicle_performance_v1() in started_at < ts <= ended_at; and
-- with started_at itself, where that is the first reading's own instant.

-- The sessions of one vehicle in a piece of time with one meter, or with none; also the first and the
-- last reading behind each: of the session, and of the piece. One that runs over the piece's edges
-- is cut by them.
CREATE OR REPLACE FUNCTION piece_sessions(
  vehicle text, energy_kind text, pause interval, since timestamptz, until timestamptz)
RETURNS TABLE (started_at timestamptz, first_ts timestamptz, ended_at timestamptz,
               piece_last_ts timestamptz, soc_start float8, soc_end float8,
               battery_temp_min float8, battery_temp_max float8)
LANGUAGE plpgsql STABLE ROWS 10 SET plan_cache_mode = force_custom_plan AS $$
DECLARE
  kwh_before float8 := CASE energy_kind
    WHEN 'register' THEN public.register_before('vehicle', vehicle, since) END;
BEGIN
  RETURN QUERY
  WITH reading AS (
    SELECT h.ts, h.soc, h.battery_temp,
           lag(h.ts) OVER in_time AS previous_ts, lag(h.soc) OVER in_time AS previous_soc,
           CASE energy_kind
             WHEN 'register' THEN public.register_step(
               h.kwh_delivered_dc, coalesce(lag(h.kwh_delivered_dc) OVER in_time, kwh_before))
             ELSE h.kwh_delivered_dc END > 0 AS charges
    FROM public.vehicle_telemetry_history h
    WHERE h.vehicle_id = vehicle AND h.ts >= since - pause AND h.ts < until
    WINDOW in_time AS (ORDER BY h.ts)
  ), charged AS (
    SELECT r.*,
           CASE WHEN r.ts - r.previous_ts <= pause THEN greatest(r.previous_ts, since)
                ELSE r.ts END AS begins,
           max(r.ts) FILTER (WHERE r.charges) OVER (
             ORDER BY r.ts ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS charged_ts
    FROM reading r WHERE r.ts >= since
  ), numbered AS (
    SELECT c.*, count(*) FILTER (WHERE c.charges AND (c.begins - c.charged_ts <= pause) IS NOT TRUE)
                  OVER (ORDER BY c.ts) AS number,
           max(c.ts) OVER () AS last_ts
    FROM charged c
  ), bounded AS (
    SELECT n.*, max(n.ts) FILTER (WHERE n.charges) OVER (PARTITION BY n.number) AS ends
    FROM numbered n
  )
  SELECT public.first(b.begins, b.ts), min(b.ts), max(b.ts), max(b.last_ts),
         public.first(CASE WHEN b.begins = b.previous_ts THEN b.previous_soc ELSE b.soc END, b.ts),
         public.last(b.soc, b.ts), min(b.battery_temp), max(b.battery_temp)
  FROM bounded b
  WHERE b.number > 0 AND b.ts <= b.ends
  GROUP BY b.number
  ORDER BY b.number;
END $$;

-- From where on readings have to be looked at, so that a session that runs at `since` is seen from
-- its first reading on: back in growing steps, to where nothing has charged for long enough.
CREATE OR REPLACE FUNCTION sessions_seen_since(
  vehicle text, energy_kind text, pause interval, since timestamptz, until timestamptz)
RETURNS timestamptz
LANGUAGE plpgsql STABLE AS $$
DECLARE
  one_hour constant interval := INTERVAL '1 hour';
  reach interval := 6 * pause;
  seen timestamptz;
  raw_since timestamptz;  -- end of the last hour with readings whose raw rows are dropped
  earliest record;
BEGIN
  LOOP
    seen := since - reach;
    SELECT max(h.hour) + one_hour INTO raw_since
    FROM unnest(tstzmultirange(tstzrange(date_bin(one_hour, seen, 'epoch'), until))
                - public.raw_chunk_ranges('vehicle_telemetry_history',
                                          date_bin(one_hour, seen, 'epoch'), until)) d
    JOIN public.vehicle_hourly_materialized h
      ON h.vehicle_id = vehicle AND h.hour >= lower(d) AND h.hour < upper(d);
    IF raw_since IS NOT NULL THEN
      seen := greatest(seen, least(raw_since, since));
    END IF;
    -- Whether a session goes on at `since` is known by twice the pause: a reading after it, that
    -- speaks of the time since a reading within it.
    SELECT * INTO earliest
    FROM public.piece_sessions(vehicle, energy_kind, pause, seen, since + 2 * pause) LIMIT 1;
    IF (raw_since <= since) IS NOT FALSE
       AND (earliest IS NULL OR earliest.first_ts > seen + 2 * pause OR earliest.ended_at < since)
    THEN
      RETURN seen;
    END IF;
    IF raw_since >= seen THEN
      RAISE EXCEPTION USING
        ERRCODE = 'ENR01',
        MESSAGE = format('the raw readings of vehicle %s before %s are past their retention',
                         vehicle, raw_since),
        DETAIL = to_char(
          CASE WHEN raw_since > since THEN public.oldest_cut()
               ELSE (SELECT min(s.ended_at) + INTERVAL '1 microsecond' FROM public.piece_sessions(
                       vehicle, energy_kind, pause, seen, until + 2 * pause) s) END
          AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        HINT = 'Sessions are found in raw readings: begin the window there or later.';
    END IF;
    reach := 4 * reach;
  END LOOP;
END $$;

-- The sessions that end in since <= ended_at < until, whole. So each is in one window only.
CREATE OR REPLACE FUNCTION charging_session_v1(
  vehicle_id text, since timestamptz, until timestamptz)
RETURNS SETOF charging_session
LANGUAGE plpgsql STABLE ROWS 10 SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
  the_vehicle ALIAS FOR $1;
  window_since ALIAS FOR $2;
  window_until ALIAS FOR $3;
  microsecond constant interval := INTERVAL '1 microsecond';
  raw_store constant bigint := public.raw_store_version();
  device record;
BEGIN
  PERFORM public.check_window(window_since, window_until);
  SELECT v.energy_kind, greatest(3 * v.reporting_interval, INTERVAL '10 minutes') AS pause
  INTO device
  FROM public.vehicle v WHERE v.vehicle_id = the_vehicle;
  IF NOT FOUND THEN
    RETURN;  -- never declared, assigned or heard
  END IF;
  RETURN QUERY
    SELECT the_vehicle, p.meter_id, s.started_at, s.ended_at,
           f.total_kwh_consumed_ac, f.total_kwh_delivered_dc, f.efficiency_ratio,
           f.average_battery_temp, s.battery_temp_min, s.battery_temp_max, s.soc_start, s.soc_end,
           f.ac_readings, f.dc_readings,
           p.until > window_until AND s.piece_last_ts - s.ended_at <= device.pause
             AND window_until - s.piece_last_ts <= device.pause
    FROM public.assigned_pieces(
           the_vehicle,
           public.sessions_seen_since(the_vehicle, device.energy_kind, device.pause,
                                      window_since, window_until),
           window_until + 2 * device.pause) p
    CROSS JOIN LATERAL public.piece_sessions(
      the_vehicle, device.energy_kind, device.pause, p.since, p.until) s
    CROSS JOIN LATERAL public.vehicle_performance_v1(
      the_vehicle,
      CASE WHEN s.started_at < s.first_ts THEN s.started_at + microsecond ELSE s.started_at END,
      s.ended_at + microsecond) f
    WHERE p.until > window_since AND s.ended_at >= window_since AND s.ended_at < window_until
    ORDER BY s.started_at;
  PERFORM public.check_raw_store(raw_store);
END $$;

-- A condition on the vehicle reaches the registry, so that one vehicle is one call.
CREATE OR REPLACE VIEW charging_session_v1 AS
SELECT v.vehicle_id, s.meter_id, s.started_at, s.ended_at, s.total_kwh_consumed_ac,
       s.total_kwh_delivered_dc, s.efficiency_ratio, s.average_battery_temp, s.battery_temp_min,
       s.battery_temp_max, s.soc_start, s.soc_end, s.ac_readings, s.dc_readings, s.is_open
FROM public.vehicle v
CROSS JOIN LATERAL public.charging_session_v1(
  v.vehicle_id, now() - INTERVAL '31 days', now()) s;
