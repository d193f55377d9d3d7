-- name: add_key
INSERT INTO api_key (key_id, secret_sha256, name, scopes, device_ids, device_prefix)
VALUES (%(key_id)s, %(secret_sha256)s, %(name)s, %(scopes)s, %(device_ids)s, %(device_prefix)s)

-- name: fetch_keys
SELECT key_id, secret_sha256, name, scopes, device_ids, device_prefix, created_at, revoked_at
FROM api_key ORDER BY created_at, key_id

-- name: revoke_key
UPDATE api_key SET revoked_at = coalesce(revoked_at, now()) WHERE key_id = %(key_id)s
RETURNING key_id
