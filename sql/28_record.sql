-- Storing readings: what the writer calls, once for a transaction and kind of device. A batch comes as one
-- array per column; no key may stand in it twice.
--
-- The live rows go first. Whoever moves one forward holds it until the commit, so that all readings of one
-- device are written one after the other, and a reading newer than the live row cannot be in history yet:
-- it is inserted without the search for a conflict. The others are behind: late, or known already.
--
-- The plans are made once and kept, for a batch of one and for one of thousands: never row by row
-- through another row set (enable_nestloop), never over a whole table (enable_seqscan).

-- Store readings of meters; returns the positions (from 1) of those that were not inserted, because
-- something is known under their key. Raises: 23505 where a live row is older than history; EP001 for
-- readings that break a hard limit: its DETAIL is [class, [[position, code, detail], ...]]. Then nothing is
-- stored.
CREATE OR REPLACE FUNCTION record_meter_readings(
  meter_ids text[], instants timestamptz[], kwh_consumed_ac float8[], voltage float8[],
  received_at timestamptz)
RETURNS SETOF bigint
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_nestloop = off SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
  power float8;      -- the stricter of soft and hard limits
  step_kwh float8;
  behind bigint[];   -- positions of readings that are not newer than the live row
  doubtful bigint[]; -- of readings inserted that have to be judged
  lost bigint[];     -- of readings behind that were not inserted
BEGIN
  SELECT least(power_kw_soft, power_kw_hard), least(step_kwh_soft, step_kwh_hard)
  INTO power, step_kwh FROM public.plausibility_limit WHERE device_class = 'meter';

  WITH incoming AS MATERIALIZED (
    SELECT r.*, (SELECT true FROM public.corrected_meter_reading c
                 WHERE c.meter_id = r.meter_id AND c.ts = r.ts LIMIT 1) AS is_corrected
    FROM unnest($1, $2, $3, $4) WITH ORDINALITY AS r (meter_id, ts, kwh, voltage, position)
  ), live AS (
    INSERT INTO public.meter_live_status AS live
      (meter_id, ts, kwh_consumed_ac, voltage, received_at)
    SELECT DISTINCT ON (meter_id) meter_id, ts, kwh, voltage, $5
    FROM incoming WHERE is_corrected IS NULL ORDER BY meter_id, ts DESC
    ON CONFLICT (meter_id) DO UPDATE
    SET ts = excluded.ts, kwh_consumed_ac = excluded.kwh_consumed_ac,
        voltage = excluded.voltage, received_at = excluded.received_at,
        previous_ts = live.ts, previous_kwh_consumed_ac = live.kwh_consumed_ac,
        previous_received_at = live.received_at
    WHERE live.ts < excluded.ts
    RETURNING meter_id, previous_ts, previous_kwh_consumed_ac, previous_received_at
  ), registered AS (
    INSERT INTO public.meter (meter_id)
    SELECT meter_id FROM live WHERE previous_ts IS NULL ORDER BY meter_id
    ON CONFLICT DO NOTHING
  ), fresh AS MATERIALIZED (
    SELECT i.meter_id, i.ts, i.kwh, i.voltage, i.position,
           coalesce(lag(i.ts) OVER w, l.previous_ts) AS previous_ts,
           coalesce(lag(i.kwh) OVER w, l.previous_kwh_consumed_ac) AS previous_kwh,
           CASE WHEN lag(i.ts) OVER w IS NULL THEN l.previous_received_at ELSE $5 END
             AS previous_received_at
    FROM incoming i JOIN live l USING (meter_id)
    WHERE i.is_corrected IS NULL AND (l.previous_ts IS NULL OR i.ts > l.previous_ts)
    WINDOW w AS (PARTITION BY i.meter_id ORDER BY i.ts)
  ), stored AS (
    INSERT INTO public.meter_telemetry_history (meter_id, ts, kwh_consumed_ac, voltage, received_at)
    SELECT meter_id, ts, kwh, voltage, $5 FROM fresh
  )
  SELECT array_agg(position) FILTER (WHERE NOT is_fresh),
         array_agg(position) FILTER (WHERE is_doubtful)
  INTO behind, doubtful
  FROM (
    SELECT i.position, f.position IS NOT NULL AS is_fresh,
      -- These tests may only be stricter than those of implausibilities().
      f.ts <= $5 - INTERVAL '58 minutes'
        AND public.clock_hours_behind(f.ts, $5, f.previous_ts, f.previous_received_at) > 0
      OR f.previous_ts IS NOT NULL
        AND (f.kwh > public.plausible_kwh(power, f.ts - f.previous_ts, '0') OR f.kwh > step_kwh)
        AND NOT coalesce((
          SELECT public.is_energy_plausible(
            f.kwh, f.previous_kwh, f.ts - f.previous_ts, d.energy_kind, d.reporting_interval,
            power, step_kwh)
          FROM public.meter d WHERE d.meter_id = f.meter_id), false) AS is_doubtful
    FROM incoming i LEFT JOIN fresh f USING (position)) j;

  IF behind IS NOT NULL THEN
    WITH incoming AS MATERIALIZED (
      SELECT * FROM unnest($1, $2, $3, $4)
      WITH ORDINALITY AS r (meter_id, ts, kwh, voltage, position)
      WHERE position IN (SELECT unnest(behind))
    ), stored AS (
      INSERT INTO public.meter_telemetry_history (meter_id, ts, kwh_consumed_ac, voltage, received_at)
      SELECT meter_id, ts, kwh, voltage, $5 FROM incoming i
      WHERE (SELECT true FROM public.corrected_meter_reading c
             WHERE c.meter_id = i.meter_id AND c.ts = i.ts LIMIT 1) IS NULL
      ON CONFLICT DO NOTHING
      RETURNING meter_id, ts
    )
    SELECT array_agg(i.position) FILTER (WHERE s.ts IS NULL),
           doubtful || array_agg(i.position) FILTER (WHERE s.ts IS NOT NULL)
    INTO lost, doubtful
    FROM incoming i LEFT JOIN stored s USING (meter_id, ts);
  END IF;

  IF doubtful IS NOT NULL THEN
    PERFORM public.judge_recorded('meter', $1, $2, doubtful, lost);
  END IF;
  RETURN QUERY SELECT unnest(lost);
END $$;

-- The same for vehicles.
CREATE OR REPLACE FUNCTION record_vehicle_readings(
  vehicle_ids text[], instants timestamptz[], soc float8[], kwh_delivered_dc float8[],
  battery_temp float8[], received_at timestamptz)
RETURNS SETOF bigint
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_nestloop = off SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
  power float8;      -- the stricter of soft and hard limits
  step_kwh float8;
  soc_rate float8;
  temp_rate float8;
  behind bigint[];   -- positions of readings that are not newer than the live row
  doubtful bigint[]; -- of readings inserted that have to be judged
  lost bigint[];     -- of readings behind that were not inserted
BEGIN
  SELECT least(power_kw_soft, power_kw_hard), least(step_kwh_soft, step_kwh_hard),
         least(soc_rate_soft, soc_rate_hard), least(temp_rate_soft, temp_rate_hard)
  INTO power, step_kwh, soc_rate, temp_rate
  FROM public.plausibility_limit WHERE device_class = 'vehicle';

  WITH incoming AS MATERIALIZED (
    SELECT r.*, (SELECT true FROM public.corrected_vehicle_reading c
                 WHERE c.vehicle_id = r.vehicle_id AND c.ts = r.ts LIMIT 1) AS is_corrected
    FROM unnest($1, $2, $3, $4, $5) WITH ORDINALITY AS r (vehicle_id, ts, soc, kwh, temp, position)
  ), live AS (
    INSERT INTO public.vehicle_live_status AS live
      (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at)
    SELECT DISTINCT ON (vehicle_id) vehicle_id, ts, soc, kwh, temp, $6
    FROM incoming WHERE is_corrected IS NULL ORDER BY vehicle_id, ts DESC
    ON CONFLICT (vehicle_id) DO UPDATE
    SET ts = excluded.ts, soc = excluded.soc, kwh_delivered_dc = excluded.kwh_delivered_dc,
        battery_temp = excluded.battery_temp, received_at = excluded.received_at,
        previous_ts = live.ts, previous_soc = live.soc,
        previous_kwh_delivered_dc = live.kwh_delivered_dc,
        previous_battery_temp = live.battery_temp, previous_received_at = live.received_at
    WHERE live.ts < excluded.ts
    RETURNING vehicle_id, previous_ts, previous_soc, previous_kwh_delivered_dc,
              previous_battery_temp, previous_received_at
  ), registered AS (
    INSERT INTO public.vehicle (vehicle_id)
    SELECT vehicle_id FROM live WHERE previous_ts IS NULL ORDER BY vehicle_id
    ON CONFLICT DO NOTHING
  ), fresh AS MATERIALIZED (
    SELECT i.vehicle_id, i.ts, i.soc, i.kwh, i.temp, i.position,
           coalesce(lag(i.ts) OVER w, l.previous_ts) AS previous_ts,
           coalesce(lag(i.soc) OVER w, l.previous_soc) AS previous_soc,
           coalesce(lag(i.kwh) OVER w, l.previous_kwh_delivered_dc) AS previous_kwh,
           coalesce(lag(i.temp) OVER w, l.previous_battery_temp) AS previous_temp,
           CASE WHEN lag(i.ts) OVER w IS NULL THEN l.previous_received_at ELSE $6 END
             AS previous_received_at
    FROM incoming i JOIN live l USING (vehicle_id)
    WHERE i.is_corrected IS NULL AND (l.previous_ts IS NULL OR i.ts > l.previous_ts)
    WINDOW w AS (PARTITION BY i.vehicle_id ORDER BY i.ts)
  ), stored AS (
    INSERT INTO public.vehicle_telemetry_history
      (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at)
    SELECT vehicle_id, ts, soc, kwh, temp, $6 FROM fresh
  )
  SELECT array_agg(position) FILTER (WHERE NOT is_fresh),
         array_agg(position) FILTER (WHERE is_doubtful)
  INTO behind, doubtful
  FROM (
    SELECT i.position, f.position IS NOT NULL AS is_fresh,
      -- These tests may only be stricter than those of implausibilities().
      f.ts <= $6 - INTERVAL '58 minutes'
        AND public.clock_hours_behind(f.ts, $6, f.previous_ts, f.previous_received_at) > 0
      OR f.previous_ts IS NOT NULL
        AND (f.kwh > public.plausible_kwh(power, f.ts - f.previous_ts, '0') OR f.kwh > step_kwh)
        AND NOT coalesce((
          SELECT public.is_energy_plausible(
            f.kwh, f.previous_kwh, f.ts - f.previous_ts, d.energy_kind, d.reporting_interval,
            power, step_kwh)
          FROM public.vehicle d WHERE d.vehicle_id = f.vehicle_id), false)
      OR abs(f.soc - f.previous_soc) > public.plausible_change(soc_rate, f.ts - f.previous_ts)
      OR abs(f.temp - f.previous_temp) > public.plausible_change(temp_rate, f.ts - f.previous_ts)
        AS is_doubtful
    FROM incoming i LEFT JOIN fresh f USING (position)) j;

  IF behind IS NOT NULL THEN
    WITH incoming AS MATERIALIZED (
      SELECT * FROM unnest($1, $2, $3, $4, $5)
      WITH ORDINALITY AS r (vehicle_id, ts, soc, kwh, temp, position)
      WHERE position IN (SELECT unnest(behind))
    ), stored AS (
      INSERT INTO public.vehicle_telemetry_history
        (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at)
      SELECT vehicle_id, ts, soc, kwh, temp, $6 FROM incoming i
      WHERE (SELECT true FROM public.corrected_vehicle_reading c
             WHERE c.vehicle_id = i.vehicle_id AND c.ts = i.ts LIMIT 1) IS NULL
      ON CONFLICT DO NOTHING
      RETURNING vehicle_id, ts
    )
    SELECT array_agg(i.position) FILTER (WHERE s.ts IS NULL),
           doubtful || array_agg(i.position) FILTER (WHERE s.ts IS NOT NULL)
    INTO lost, doubtful
    FROM incoming i LEFT JOIN stored s USING (vehicle_id, ts);
  END IF;

  IF doubtful IS NOT NULL THEN
    PERFORM public.judge_recorded('vehicle', $1, $2, doubtful, lost);
  END IF;
  RETURN QUERY SELECT unnest(lost);
END $$;

-- Judge the doubtful among readings just inserted, given by their positions: flag what is suspect. With a
-- doubtful reading all of its device's are judged: where one is refused, the next follows another. Here
-- plans are made as ever again.
CREATE OR REPLACE FUNCTION judge_recorded(
  device_class text, device_ids text[], instants timestamptz[], doubtful bigint[], lost bigint[])
RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = auto SET enable_nestloop = on AS $$
DECLARE
  devices text[];
  times timestamptz[];
  positions bigint[];
  refusals json;
BEGIN
  SELECT array_agg(s.device), array_agg(s.ts), array_agg(s.place) INTO devices, times, positions
  FROM (SELECT r.device, r.ts, r.place,
               bool_or(r.place IN (SELECT unnest(doubtful))) OVER (PARTITION BY r.device) AS is_judged
        FROM unnest(device_ids, instants) WITH ORDINALITY AS r (device, ts, place)
        WHERE r.place NOT IN (SELECT unnest(lost))) s
  WHERE s.is_judged;
  SELECT json_agg(json_build_array(positions[i.position], i.code, i.detail)) INTO refusals
  FROM public.implausible_beyond_limits(device_class, devices, times) i;
  IF refusals IS NOT NULL THEN
    RAISE EXCEPTION 'readings break a hard limit'
      USING ERRCODE = 'EP001', DETAIL = json_build_array(device_class, refusals);
  END IF;
  PERFORM public.judge_inserted(device_class, devices, times);
END $$;
