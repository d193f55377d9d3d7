-- The definition behind GET /v1/analytics/performance/{vehicleId}/series: the same measures, bucket
-- by bucket, each cut by the window.

-- Where a window begins, and where hours or days begin in it by the clocks of a time zone. A local
-- day has 23 to 25 hours; an hour that the clocks repeat is two buckets. Offsets of all zones have
-- been whole quarters of an hour for decades, so that is the grid on which clocks are looked at.
CREATE OR REPLACE FUNCTION local_edges(
  since timestamptz, until timestamptz, bucket interval, time_zone text)
RETURNS SETOF timestamptz
LANGUAGE sql STABLE AS $$
  WITH grid AS (
    SELECT t, t AT TIME ZONE time_zone AS local
    FROM generate_series(date_bin('15 minutes', since, 'epoch'), until, '15 minutes') t
  ), clocks AS (
    SELECT t,
           CASE bucket WHEN INTERVAL '1 day' THEN date_trunc('day', local)
                       ELSE date_trunc('hour', local) END AS label,
           CASE bucket WHEN INTERVAL '1 day' THEN NULL
                       ELSE local - (t AT TIME ZONE 'UTC') END AS ahead
    FROM grid
  ), edges AS (
    SELECT t, (label, ahead) IS DISTINCT FROM lag((label, ahead)) OVER (ORDER BY t) AS is_edge
    FROM clocks
  )
  SELECT since
  UNION
  SELECT t FROM edges WHERE is_edge AND t > since AND t < until
$$;

CREATE OR REPLACE FUNCTION vehicle_performance_series_v1(
  vehicle_id text, since timestamptz, until timestamptz, bucket interval DEFAULT '1 hour',
  time_zone text DEFAULT 'UTC')
RETURNS SETOF vehicle_performance
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF bucket NOT IN (INTERVAL '1 hour', INTERVAL '1 day') THEN
    RAISE EXCEPTION 'bucket must be 1 hour or 1 day' USING ERRCODE = 'invalid_parameter_value';
  END IF;
  PERFORM public.check_window($2, $3);
  RETURN QUERY
    SELECT p.*
    FROM public.vehicle_performances(
      $1, ARRAY(SELECT edge FROM public.local_edges($2, $3, $4, $5) AS edge ORDER BY edge), $3) p;
END $$;
