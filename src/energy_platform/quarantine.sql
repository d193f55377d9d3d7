-- name: fetch_quarantine
-- A page, newest first.
SELECT quarantine_id, code, path, detail, device_id, count, first_seen, last_seen, payload,
       payload_bytes, key_id
FROM quarantine
WHERE (%(code)s::text IS NULL OR code = %(code)s)
  AND (%(device_id)s::text IS NULL OR device_id = %(device_id)s)
  AND (%(before)s::bigint IS NULL OR quarantine_id < %(before)s)
ORDER BY quarantine_id DESC LIMIT %(limit)s

-- name: fetch_for_replay
SELECT quarantine_id, code, path, detail, device_id, count, first_seen, last_seen, payload,
       payload_bytes, key_id
FROM quarantine
WHERE (%(ids)s::bigint[] IS NULL OR quarantine_id = ANY (%(ids)s))
  AND (%(code)s::text IS NULL OR code = %(code)s)
  AND quarantine_id > %(after)s
ORDER BY quarantine_id LIMIT %(limit)s

-- name: delete_replayed
DELETE FROM quarantine WHERE quarantine_id = ANY (%(ids)s)
