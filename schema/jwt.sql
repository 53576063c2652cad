-- jwt.sql: access by JSON Web Tokens, asked by pgpubsub's -auth flag.
--
-- Your web application signs what a user may subscribe to, with a secret that it
-- shares with this database; nothing is stored for a token. (Where tokens must be
-- taken back one by one, see access.sql, which can do that.)
--
-- Load it, as often as you like, on PostgreSQL 13 or later, as any role that
-- may create a schema (it need not be a superuser), and set the secret, a text of
-- 32 bytes or more (RFC 7518, section 3.2; `openssl rand -hex 32` makes one). No
-- extension is needed:
--
--     psql -v ON_ERROR_STOP=1 -d DATABASE -f jwt.sql
--     select pgpubsub.set_jwt_secret('...');
--
-- Nobody else may do anything then. For a role of your own, here
-- `pgpubsub_server` for the role that pgpubsub connects as:
--
--     grant usage on schema pgpubsub to pgpubsub_server;
--     grant execute on function
--         pgpubsub.jwt_may_subscribe(text, text, text) to pgpubsub_server;
--
--     pgpubsub.py -chan orders,customers -auth pgpubsub.jwt_may_subscribe
--
-- A token has the algorithm HS256 and these claims; it may have others:
--
--     {"exp": 1893456000, "channels": ["orders", "news_*"], "id": "42"}
--
--     exp       until when it is good, in seconds since 1970: required
--     nbf       from when on it is good: heeded if it is there
--     channels  names and patterns: * is any number of characters, ? is one
--     id        the only id that it is for, a string or a number; without this
--               claim it is for any id, and for none, who sees all of a channel
--
-- What is open when a token expires, pgpubsub closes (see -recheck). A new secret
-- ends all tokens at once.

begin;

-- Loading it again need not tell what is there already.
set local client_min_messages = warning;
-- Names below are PostgreSQL's own, whatever somebody has put into `public`.
set local search_path = pg_catalog, pg_temp;

create schema if not exists pgpubsub;

-- Whoever may create a schema could have prepared this one, with a trigger or a
-- function of theirs in it that would run with the rights of whoever loads this
-- file. So all that is there must belong to the role that loads it, or to a
-- superuser, who needs no such trick. A superuser should not get around this by
-- `set role`, as a trigger can undo that.
do $$
declare
    found_owner name;
    found_object text;
begin
    select rolname, pg_describe_object(object.class, object.oid, 0)
      into found_owner, found_object
      from (select 'pg_namespace'::regclass as class, oid, nspowner as owner
              from pg_namespace where oid = 'pgpubsub'::regnamespace
            union all
            select 'pg_class'::regclass, oid, relowner
              from pg_class where relnamespace = 'pgpubsub'::regnamespace
            union all
            select 'pg_proc'::regclass, oid, proowner
              from pg_proc where pronamespace = 'pgpubsub'::regnamespace) as object
      join pg_roles on pg_roles.oid = object.owner
     where rolname <> current_user and not rolsuper
     limit 1;
    if found then
        raise exception '% belongs to role %, not to role %',
            found_object, quote_ident(found_owner), quote_ident(current_user)
            using hint = 'Nothing was changed. If that is right, load this file as '
                         'the role that owns it; else drop it first.';
    end if;
end
$$;

comment on schema pgpubsub is
    'pgpubsub: notifications for websocket clients';

-- HMAC-SHA256 is sha256(outer_key || sha256(inner_key || message)), where both keys
-- are the secret, padded and XORed with a constant (RFC 2104). They are made once,
-- so that a signature takes two calls of PostgreSQL's own sha256().
create table if not exists pgpubsub.jwt_secret (
    inner_key bytea   not null check (octet_length(inner_key) = 64),
    outer_key bytea   not null check (octet_length(outer_key) = 64),
    one_row   boolean primary key default true check (one_row)
);
comment on table pgpubsub.jwt_secret is
    'The secret that tokens are signed with, as the two keys of HMAC: for its owner''s eyes alone; set by set_jwt_secret()';

create or replace function pgpubsub.set_jwt_secret(secret text)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    key bytea := convert_to(secret, 'UTF8');
    new_inner_key bytea := decode(repeat('36', 64), 'hex');
    new_outer_key bytea := decode(repeat('5c', 64), 'hex');
begin
    if key is null or octet_length(key) < 32 then
        raise exception 'a secret for HS256 has at least 32 bytes';
    end if;
    -- SHA-256 works on blocks of 64 bytes: a longer key is hashed, and a shorter
    -- one filled up with zeros, which change nothing in an XOR.
    if octet_length(key) > 64 then
        key := sha256(key);
    end if;
    for place in 0 .. octet_length(key) - 1 loop
        new_inner_key := set_byte(new_inner_key, place,
            get_byte(new_inner_key, place) # get_byte(key, place));
        new_outer_key := set_byte(new_outer_key, place,
            get_byte(new_outer_key, place) # get_byte(key, place));
    end loop;

    insert into pgpubsub.jwt_secret (inner_key, outer_key)
    values (new_inner_key, new_outer_key)
    on conflict (one_row) do update
        set inner_key = excluded.inner_key, outer_key = excluded.outer_key;
    -- Makes pgpubsub ask at once, when this commits, who may stay.
    perform pg_notify('pgpubsub', 'access');
end
$$;
comment on function pgpubsub.set_jwt_secret is
    'Sets the secret that tokens are signed with; those signed with another one end';

-- The JSON of one part of a token, null if there is none. Only what is wrong with
-- the text is caught: anything else is no fault of the token's.
create or replace function pgpubsub.jwt_part(part text)
returns jsonb
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    return convert_from(
        -- base64url (RFC 4648, section 5) without its padding
        decode(translate(part, '-_', '+/') || repeat('=', -length(part) & 3), 'base64'),
        'UTF8')::jsonb;
exception when data_exception or program_limit_exceeded then
    return null;
end
$$;
comment on function pgpubsub.jwt_part is
    'Decodes the header or the claims of a token; null if that is no JSON';

create or replace function pgpubsub.jwt_may_subscribe(token text, channel text, id text)
returns boolean
language plpgsql
stable
security definer  -- so that the server needs no rights on the secret
set search_path = pg_catalog, pg_temp
as $$
declare
    secret pgpubsub.jwt_secret;
    signed text;
    signature text;
    header jsonb;
    claims jsonb;
    now_in_seconds numeric := extract(epoch from now());
begin
    -- The signature first: what is behind a wrong one is not even read.
    if (token ~ '^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}$') is not true then
        return false;
    end if;
    select * into secret from pgpubsub.jwt_secret;
    if not found then
        return false;
    end if;
    signed := left(token, -44);
    signature := translate(
        encode(sha256(secret.outer_key || sha256(secret.inner_key || convert_to(signed, 'UTF8'))),
               'base64'),
        '+/=', '-_');
    -- Hashes are compared, which nobody can foresee who does not know the key: how
    -- long the comparison takes tells nothing about the signature.
    if sha256(secret.outer_key || convert_to(signature, 'UTF8'))
        <> sha256(secret.outer_key || convert_to(right(token, 43), 'UTF8')) then
        return false;
    end if;

    header := pgpubsub.jwt_part(split_part(token, '.', 1));
    claims := pgpubsub.jwt_part(split_part(token, '.', 2));
    -- `crit` names extensions that must be understood (RFC 7515, section 4.1.11).
    if header -> 'alg' is distinct from '"HS256"' or header ? 'crit' then
        return false;
    end if;

    -- Types come first, one `if` each: SQL's `and` promises no order, and a cast of
    -- another type would be an error. Times are compared as numeric: any JSON
    -- number is one, however large. What is no object has no `exp`.
    if jsonb_typeof(claims -> 'exp') is distinct from 'number' then
        return false;
    end if;
    if (claims -> 'exp')::numeric <= now_in_seconds then
        return false;
    end if;
    if claims ? 'nbf' then
        if jsonb_typeof(claims -> 'nbf') <> 'number' then
            return false;
        end if;
        if (claims -> 'nbf')::numeric > now_in_seconds then
            return false;
        end if;
    end if;

    if claims ? 'id' then
        if jsonb_typeof(claims -> 'id') not in ('string', 'number')
            or claims ->> 'id' is distinct from id then
            return false;
        end if;
    end if;

    if jsonb_typeof(claims -> 'channels') is distinct from 'array' then
        return false;
    end if;
    -- A list with anything but strings in it is refused as a whole. What LIKE would
    -- take for its own wildcards is escaped with !, and then * and ? become them.
    return coalesce(
        (select bool_and(jsonb_typeof(pattern) = 'string')
            and bool_or(channel like
                    translate(replace(replace(replace(
                        pattern #>> '{}', '!', '!!'), '%', '!%'), '_', '!_'),
                        '*?', '%_')
                    escape '!')
           from jsonb_array_elements(claims -> 'channels') as pattern),
        false);
end
$$;
comment on function pgpubsub.jwt_may_subscribe is
    'For pgpubsub''s -auth: may the holder of this JSON Web Token subscribe to this channel as this client, or (null) to all of it?';

-- Privileges: none but those you grant, see above.
-- They name what is of this file, lest they take what another one grants.
revoke all on schema pgpubsub from public;
revoke all on pgpubsub.jwt_secret from public;
revoke all on function pgpubsub.set_jwt_secret(text), pgpubsub.jwt_part(text),
    pgpubsub.jwt_may_subscribe(text, text, text)
    from public;

commit;
