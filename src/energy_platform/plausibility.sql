-- name: fetch_limits
SELECT * FROM plausibility_limit ORDER BY device_class

-- name: put_limits
-- Only what is named in `given` changes; NULL takes a limit away.
UPDATE plausibility_limit SET
  power_kw_soft = CASE WHEN 'power_kw_soft' = ANY (%(given)s) THEN %(power_kw_soft)s ELSE power_kw_soft END,
  power_kw_hard = CASE WHEN 'power_kw_hard' = ANY (%(given)s) THEN %(power_kw_hard)s ELSE power_kw_hard END,
  step_kwh_soft = CASE WHEN 'step_kwh_soft' = ANY (%(given)s) THEN %(step_kwh_soft)s ELSE step_kwh_soft END,
  step_kwh_hard = CASE WHEN 'step_kwh_hard' = ANY (%(given)s) THEN %(step_kwh_hard)s ELSE step_kwh_hard END,
  temp_rate_soft = CASE WHEN 'temp_rate_soft' = ANY (%(given)s) THEN %(temp_rate_soft)s ELSE temp_rate_soft END,
  temp_rate_hard = CASE WHEN 'temp_rate_hard' = ANY (%(given)s) THEN %(temp_rate_hard)s ELSE temp_rate_hard END,
  soc_rate_soft = CASE WHEN 'soc_rate_soft' = ANY (%(given)s) THEN %(soc_rate_soft)s ELSE soc_rate_soft END,
  soc_rate_hard = CASE WHEN 'soc_rate_hard' = ANY (%(given)s) THEN %(soc_rate_hard)s ELSE soc_rate_hard END
WHERE device_class = %(device_class)s
RETURNING *

-- name: fetch_suspects
-- A page, those flagged last first.
SELECT suspect_id, ts, code, detail,
       CASE device_class WHEN 'meter' THEN device_id END AS meter_id,
       CASE device_class WHEN 'vehicle' THEN device_id END AS vehicle_id
FROM suspect_reading
WHERE (%(meter_id)s::text IS NULL OR device_class = 'meter' AND device_id = %(meter_id)s)
  AND (%(vehicle_id)s::text IS NULL OR device_class = 'vehicle' AND device_id = %(vehicle_id)s)
  AND (%(code)s::text IS NULL OR code = %(code)s)
  AND (%(before)s::bigint IS NULL OR suspect_id < %(before)s)
ORDER BY suspect_id DESC LIMIT %(limit)s
