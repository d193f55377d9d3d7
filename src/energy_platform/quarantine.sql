-- name: fetch_quarantine
-- A page, newest first, as far as its payloads have room; at least one entry. of_entries: how many
-- there were without that bound.
SELECT quarantine_id, code, path, detail, device_id, count, first_seen, last_seen, payload,
       payload_bytes, key_id, of_entries
FROM (
  SELECT *, count(*) OVER () AS of_entries,
         sum(octet_length(payload)) OVER (ORDER BY quarantine_id DESC) - octet_length(payload)
           AS bytes_before
  FROM (
    SELECT * FROM quarantine
    WHERE (%(code)s::text IS NULL OR code = %(code)s)
      AND (%(device_id)s::text IS NULL OR device_id = %(device_id)s)
      AND (%(before)s::bigint IS NULL OR quarantine_id < %(before)s)
    ORDER BY quarantine_id DESC LIMIT %(limit)s
  ) page
) measured
WHERE bytes_before < %(bytes_max)s
ORDER BY quarantine_id DESC

-- name: fetch_for_replay
-- The same, oldest first.
SELECT quarantine_id, code, path, detail, device_id, count, first_seen, last_seen, payload,
       payload_bytes, key_id, of_entries
FROM (
  SELECT *, count(*) OVER () AS of_entries,
         sum(octet_length(payload)) OVER (ORDER BY quarantine_id) - octet_length(payload)
           AS bytes_before
  FROM (
    SELECT * FROM quarantine
    WHERE (%(ids)s::bigint[] IS NULL OR quarantine_id = ANY (%(ids)s))
      AND (%(code)s::text IS NULL OR code = %(code)s)
      AND (%(device_id)s::text IS NULL OR device_id = %(device_id)s)
      AND quarantine_id > %(after)s
    ORDER BY quarantine_id LIMIT %(limit)s
  ) page
) measured
WHERE bytes_before < %(bytes_max)s
ORDER BY quarantine_id

-- name: count_quarantine
-- Entries and readings by code, by device (those with most), and of all: by one look at the table.
SELECT part, code, device_id, entries, readings, codes, first_seen, last_seen, parts
FROM (
  SELECT CASE GROUPING(code, device_id) WHEN 1 THEN 'code' WHEN 2 THEN 'device' ELSE 'all' END AS part,
         code, device_id, count(*) AS entries, coalesce(sum(count), 0)::bigint AS readings,
         array_agg(DISTINCT code) AS codes, min(first_seen) AS first_seen,
         max(last_seen) AS last_seen,
         count(*) OVER (PARTITION BY GROUPING(code, device_id)) AS parts,
         row_number() OVER (PARTITION BY GROUPING(code, device_id)
                            ORDER BY sum(count) DESC, code, device_id) AS place
  FROM quarantine
  WHERE (%(code)s::text IS NULL OR code = %(code)s)
    AND (%(device_id)s::text IS NULL OR device_id = %(device_id)s)
  GROUP BY GROUPING SETS ((code), (device_id), ())
) counted
WHERE part <> 'device' OR place <= %(devices_max)s
ORDER BY part, place

-- name: delete_replayed
DELETE FROM quarantine WHERE quarantine_id = ANY (%(ids)s)
