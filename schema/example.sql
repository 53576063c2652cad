-- example.sql: a small shop whose customers see their orders change.
--
-- Triggers send each change of a row by plain NOTIFY, on the channels `orders`
-- and `customers`, to the customer it is about:
--
--     {"op":"update","table":"orders","id":"1","key":7,"new":{...},"old":{...}}
--
-- "id" is the customer, which is where pgpubsub looks for the client that a
-- payload is for; "key" is the row's own id.
--
-- Load it, as often as you like, on PostgreSQL 13 or later, as any role that
-- may create a schema (it need not be a superuser):
--
--     psql -v ON_ERROR_STOP=1 -d DATABASE -f example.sql
--
-- Then let pgpubsub serve the two channels, and open a websocket on
-- ws://localhost/subscribe?id=1, which is Ada:
--
--     pgpubsub.py -chan orders,customers
--
--     insert into shop.orders (customer_id, item) values (1, 'tea');
--     update shop.orders set status = 'shipped' where customer_id = 1;
--     update shop.orders set customer_id = 2 where customer_id = 1;
--     delete from shop.orders;
--
-- NOTIFY needs no privilege, so a role that writes needs only what it would
-- need anyhow (and the role that pgpubsub connects as needs nothing):
--
--     grant usage on schema shop to app;
--     grant select, insert, update, delete on shop.customers, shop.orders to app;
--
-- To use the log of pgpubsub.sql instead, so that clients who come back have missed
-- nothing and no row is too long, load that file and then, once:
--
--     select shop.use_log();
--
-- Whoever writes publishes then, and needs the grants of pgpubsub.sql for that: usage on
-- the schema pgpubsub, and execute on pgpubsub.publish(text, text, text).
--
-- To see something happen: select shop.trade();

begin;

-- Loading it again need not tell what is there already.
set local client_min_messages = warning;
-- Names below are PostgreSQL's own, whatever somebody has put into `public`.
set local search_path = pg_catalog, pg_temp;

create schema if not exists shop;

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
              from pg_namespace where oid = 'shop'::regnamespace
            union all
            select 'pg_class'::regclass, oid, relowner
              from pg_class where relnamespace = 'shop'::regnamespace
            union all
            select 'pg_proc'::regclass, oid, proowner
              from pg_proc where pronamespace = 'shop'::regnamespace) as object
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

comment on schema shop is 'pgpubsub''s example: a small shop';

create table if not exists shop.customers (
    id   bigint generated always as identity primary key,
    name text   not null
);
comment on table shop.customers is 'Customers; changes go to the channel `customers`';

create table if not exists shop.orders (
    id          bigint  generated always as identity primary key,
    customer_id bigint  not null references shop.customers on delete cascade,
    item        text    not null,
    quantity    integer not null default 1 check (quantity > 0),
    status      text    not null default 'new'
);
comment on table shop.orders is 'Orders; changes go to the channel `orders`, for the customer';

create index if not exists orders_customer_id on shop.orders (customer_id);

insert into shop.customers (name)
select name from unnest(array['Ada', 'Grace']) name
 where not exists (select from shop.customers);

-- Sends one change.
create or replace function shop.send(
    channel text, op text, "table" text, id text, key json, new json, old json)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    payload text;
begin
    select row_to_json(change) into payload
      from (select op, "table", id, key, new, old) change;
    -- NOTIFY takes less than 8,000 bytes, and fails the transaction if there are
    -- more. Rather send the key, for the client to fetch the row with.
    if octet_length(payload) >= 8000 then
        select row_to_json(change) into payload
          from (select op, "table", id, key, true as truncated) change;
    end if;
    -- Not in this shop, but where a key is text that may be too long as well:
    -- then everybody on the channel learns that something has changed.
    if octet_length(payload) >= 8000 then
        select row_to_json(change) into payload
          from (select op, "table", null as id, null as key, true as truncated) change;
    end if;
    perform pg_notify(channel, payload);
end
$$;
comment on function shop.send is
    'Sends a change of a row by NOTIFY, or only its key where the rows are too long for that';

create or replace function shop.notify_change()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    old_id text;  -- whose it was
    new_id text;  -- whose it is
begin
    -- An error if there is no such column, as null would mean everybody.
    if tg_op <> 'INSERT' then
        execute format('select ($1).%I::text', tg_argv[1]) into old_id using old;
    end if;
    if tg_op <> 'DELETE' then
        execute format('select ($1).%I::text', tg_argv[1]) into new_id using new;
    end if;

    if tg_op = 'UPDATE' and old_id is distinct from new_id then
        -- The row goes from one customer to another: for the one it is gone, for
        -- the other it is new. Both must hear of it, and neither may see what
        -- the row is, or was, with the other.
        perform shop.send(tg_argv[0], 'delete', tg_table_name, old_id,
                          to_json(old.id), null, row_to_json(old));
        perform shop.send(tg_argv[0], 'insert', tg_table_name, new_id,
                          to_json(new.id), row_to_json(new), null);
    else
        perform shop.send(tg_argv[0], lower(tg_op), tg_table_name, coalesce(new_id, old_id),
                          to_json(coalesce(new.id, old.id)), row_to_json(new), row_to_json(old));
    end if;
    return null;
end
$$;
comment on function shop.notify_change is
    'Row trigger (channel, customer_column): sends {"op", "table", "id", "key", "new", "old"} to the customer';

-- Made once, and then left alone: it may have been changed for the log's.
do $$
begin
    create trigger notify after insert or update or delete on shop.customers
        for each row execute function shop.notify_change('customers', 'id');
    comment on trigger notify on shop.customers is
        'Tells the customer of changes';
exception when duplicate_object then
end
$$;

do $$
begin
    create trigger notify after insert or update or delete on shop.orders
        for each row execute function shop.notify_change('orders', 'customer_id');
    comment on trigger notify on shop.orders is
        'Tells the customer of changes of the order';
exception when duplicate_object then
end
$$;

-- What an application does to use the log: another trigger on its tables.
create or replace function shop.use_log() returns void
language plpgsql
as $$
begin
    drop trigger if exists notify on shop.customers;
    create trigger notify after insert or update or delete on shop.customers
        for each row execute function pgpubsub.notify_change('customers', 'id');
    drop trigger if exists notify on shop.orders;
    create trigger notify after insert or update or delete on shop.orders
        for each row execute function pgpubsub.notify_change('orders', 'customer_id');
end
$$;
comment on function shop.use_log is
    'Lets changes go through the log of pgpubsub.sql; loading example.sql again leaves it so';

create or replace function shop.trade() returns void
language plpgsql
as $$
begin
    case floor(random() * 4)
    when 0 then
        update shop.orders set status = 'shipped'
         where id = (select min(id) from shop.orders where status = 'new');
    when 1 then
        delete from shop.orders
         where id = (select min(id) from shop.orders where status = 'shipped');
    when 2 then
        update shop.customers
           set name = case when name like '% (regular)' then replace(name, ' (regular)', '')
                           else name || ' (regular)' end
         where id = (select id from shop.customers order by random() limit 1);
    else
        insert into shop.orders (customer_id, item, quantity)
        select id, (array['tea', 'coffee', 'cake'])[floor(1 + random() * 3)],
               floor(1 + random() * 4)
          from shop.customers order by random() limit 1;
    end case;
end
$$;
comment on function shop.trade is
    'Places an order, ships one, forgets one that was shipped, or makes a customer a regular or no longer one';

commit;
