-- What is needed where history changes otherwise than by growing.

-- Wait until every reading of a class that is being inserted is committed, and let none be inserted until
-- this transaction ends. Ingest locks this table before it takes its snapshot, and nothing else that
-- lasts writes to it; readers are not held. After five seconds it gives up: ingest waits behind it.
CREATE OR REPLACE FUNCTION hold_ingest(device_class text) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
BEGIN
  IF device_class = 'meter' THEN
    LOCK TABLE public.meter_live_status IN SHARE ROW EXCLUSIVE MODE;
  ELSE
    LOCK TABLE public.vehicle_live_status IN SHARE ROW EXCLUSIVE MODE;
  END IF;
END $$;

-- The same for one device, whose readings then wait in front of their live row.
CREATE OR REPLACE FUNCTION hold_device(device_class text, device text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  IF device_class = 'meter' THEN
    PERFORM FROM public.meter_live_status l WHERE l.meter_id = device FOR UPDATE;
  ELSE
    PERFORM FROM public.vehicle_live_status l WHERE l.vehicle_id = device FOR UPDATE;
  END IF;
END $$;

-- Make the live row of one device be its newest reading, after readings up to an instant were taken out
-- of history or put into it: a newer row stays.
CREATE OR REPLACE FUNCTION reset_live(device_class text, device text, until timestamptz)
RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  IF device_class = 'meter' THEN
    IF EXISTS (SELECT FROM public.meter_live_status l
               WHERE l.meter_id = device AND l.ts > until) THEN
      RETURN;
    END IF;
    DELETE FROM public.meter_live_status l WHERE l.meter_id = device;
    INSERT INTO public.meter_live_status (meter_id, ts, kwh_consumed_ac, voltage, received_at)
    SELECT h.meter_id, h.ts, h.kwh_consumed_ac, h.voltage, h.received_at
    FROM public.meter_telemetry_history h WHERE h.meter_id = device ORDER BY h.ts DESC LIMIT 1;
  ELSE
    IF EXISTS (SELECT FROM public.vehicle_live_status l
               WHERE l.vehicle_id = device AND l.ts > until) THEN
      RETURN;
    END IF;
    DELETE FROM public.vehicle_live_status l WHERE l.vehicle_id = device;
    INSERT INTO public.vehicle_live_status
      (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at)
    SELECT h.vehicle_id, h.ts, h.soc, h.kwh_delivered_dc, h.battery_temp, h.received_at
    FROM public.vehicle_telemetry_history h WHERE h.vehicle_id = device ORDER BY h.ts DESC LIMIT 1;
  END IF;
END $$;
