//! The table of `dog node stat`, tabs between its columns.

use serde_json::{Value, json};
use sheep_core::units::HumanSize;

use super::text::put;
use crate::node::stat::{Cached, HEADER, Limited, Row, Stat};
use crate::report::{Show, Style};

impl Show for Stat {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        let is_watched = self.client.rates.is_some();
        let rates = if is_watched { "\tWRBW\tRDBW\tRPS" } else { "" };
        put(out, format_args!("{HEADER}{rates}\n"));
        for (name, row) in [("Client", &self.client), ("Peer", &self.peer)] {
            put(out, format_args!("{name}\t"));
            put_row(row, |bytes| HumanSize(bytes).to_string(), out);
        }
        if !self.limits.is_empty() {
            put(out, format_args!("\nLimited\tOps/s\tBytes/s\tBurst\tDelayed\tWaiting\n"));
        }
        for limited in &self.limits {
            let limit = |value: u64, shown: String| if value == 0 { "-".to_owned() } else { shown };
            put(
                out,
                format_args!(
                    "{}\t{}\t{}\t{} s\t{}\t{}\n",
                    limited.name,
                    limit(limited.operations_per_second, limited.operations_per_second.to_string()),
                    limit(limited.bytes_per_second, HumanSize(limited.bytes_per_second).to_string()),
                    limited.burst_seconds,
                    limited.delayed,
                    limited.waiting
                ),
            );
        }
        if let Some(cache) = &self.cache {
            let rate = cache.hit_percent().map_or("-".to_owned(), |percent| format!("{percent:.1} %"));
            let (used, size) = (HumanSize(cache.used_bytes), HumanSize(cache.size_bytes));
            let state = if cache.failed { "failed: see the log" } else { "in use" };
            put(out, format_args!("\nCache\tHits\tMisses\tHit rate\tUsed\tSize\n"));
            put(out, format_args!("{state}\t{}\t{}\t{rate}\t{used}\t{size}\n", cache.hits, cache.misses));
        }
    }

    fn raw(&self, _: &Style, out: &mut Vec<u8>) {
        for row in [&self.client, &self.peer] {
            put_row(row, |bytes| bytes.to_string(), out);
        }
    }

    fn json(&self) -> Option<Value> {
        let limits: Vec<Value> = self.limits.iter().map(limited_json).collect();
        let cache = self.cache.as_ref().map(cache_json);
        Some(json!({"client": row_json(&self.client), "peer": row_json(&self.peer), "limits": limits, "cache": cache}))
    }
}

fn put_row(row: &Row, size: impl Fn(u64) -> String, out: &mut Vec<u8>) {
    let figures = &row.figures;
    let counts = [figures.active, figures.total, figures.writes, figures.reads, figures.removes, figures.flushes];
    let mut cells: Vec<String> = counts.iter().map(u64::to_string).collect();
    cells.extend([size(figures.written_bytes), size(figures.read_bytes)]);
    if let Some(rates) = &row.rates {
        cells.extend([size(rates.written_bytes), size(rates.read_bytes), rates.requests.to_string()]);
    }
    put(out, format_args!("{}\n", cells.join("\t")));
}

fn limited_json(limited: &Limited) -> Value {
    json!({
        "name": limited.name,
        "operations_per_second": limited.operations_per_second,
        "bytes_per_second": limited.bytes_per_second,
        "burst_seconds": limited.burst_seconds,
        "delayed": limited.delayed,
        "waiting": limited.waiting,
    })
}

fn cache_json(cache: &Cached) -> Value {
    json!({
        "size_bytes": cache.size_bytes,
        "used_bytes": cache.used_bytes,
        "hits": cache.hits,
        "misses": cache.misses,
        "failed": cache.failed,
    })
}

fn row_json(row: &Row) -> Value {
    let figures = &row.figures;
    let mut value = json!({
        "active": figures.active,
        "total": figures.total,
        "write": figures.writes,
        "read": figures.reads,
        "remove": figures.removes,
        "flush": figures.flushes,
        "written_bytes": figures.written_bytes,
        "read_bytes": figures.read_bytes,
    });
    if let Some(rates) = &row.rates {
        value["written_bytes_per_second"] = json!(rates.written_bytes);
        value["read_bytes_per_second"] = json!(rates.read_bytes);
        value["requests_per_second"] = json!(rates.requests);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::stat::{Figures, Rates};
    use jiff::tz::TimeZone;

    fn stat(rates: Option<Rates>) -> Stat {
        let figures = Figures {
            active: 1,
            total: 10,
            writes: 4,
            reads: 3,
            removes: 2,
            flushes: 1,
            written_bytes: 12 << 20,
            read_bytes: 1 << 30,
        };
        Stat { client: Row { figures, rates }, peer: Row { figures: Figures::default(), rates }, ..Stat::default() }
    }

    fn both(stat: &Stat) -> (String, String) {
        let style = Style { zone: TimeZone::UTC, is_terminal: false };
        let (mut table, mut raw) = (Vec::new(), Vec::new());
        stat.table(&style, &mut table);
        stat.raw(&style, &mut raw);
        (String::from_utf8(table).expect("text"), String::from_utf8(raw).expect("text"))
    }

    #[test]
    fn writes_are_below_write_and_reads_below_read() {
        let (table, raw) = both(&stat(None));
        assert_eq!(
            table,
            "Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD\n\
             Client\t1\t10\t4\t3\t2\t1\t12 MB\t1.0 GB\nPeer\t0\t0\t0\t0\t0\t0\t0.0 MB\t0.0 MB\n"
        );
        assert_eq!(raw, "1\t10\t4\t3\t2\t1\t12582912\t1073741824\n0\t0\t0\t0\t0\t0\t0\t0\n");
        assert_eq!(stat(None).json().expect("JSON")["client"]["write"], 4);
    }

    #[test]
    fn volumes_with_limits_follow_in_a_table_of_their_own() {
        let limited = Limited { name: "disk".into(), operations_per_second: 500, delayed: 7, ..Limited::default() };
        let limits = vec![limited.clone(), Limited { bytes_per_second: 50 << 20, operations_per_second: 0, ..limited }];
        let (table, raw) = both(&Stat { limits, ..stat(None) });
        let (_, second) = table.split_once("\n\n").expect("two tables");
        let rows = "disk\t500\t-\t0 s\t7\t0\ndisk\t-\t50 MB\t0 s\t7\t0\n";
        assert_eq!(second, format!("Limited\tOps/s\tBytes/s\tBurst\tDelayed\tWaiting\n{rows}"));
        assert_eq!(raw.lines().count(), 2, "as scripts know it");
    }

    #[test]
    fn a_cache_follows_with_its_hit_rate() {
        let cache = Cached { size_bytes: 1 << 30, used_bytes: 12 << 20, hits: 3, misses: 1, failed: false };
        let shown = |cache| both(&Stat { cache: Some(cache), ..stat(None) }).0;
        let table = shown(cache);
        let (_, second) = table.split_once("\n\n").expect("two tables");
        assert_eq!(second, "Cache\tHits\tMisses\tHit rate\tUsed\tSize\nin use\t3\t1\t75.0 %\t12 MB\t1.0 GB\n");
        assert!(shown(Cached { hits: 0, misses: 0, failed: true, ..cache }).contains("failed: see the log\t0\t0\t-\t"));
        let json = Stat { cache: Some(cache), ..stat(None) }.json().expect("JSON");
        assert_eq!((&json["cache"]["hits"], &stat(None).json().expect("JSON")["cache"]), (&json!(3), &Value::Null));
    }

    #[test]
    fn watched_it_has_rates() {
        let rates = Rates { written_bytes: 1 << 20, read_bytes: 0, requests: 9 };
        let (table, raw) = both(&stat(Some(rates)));
        assert!(table.starts_with("Request\t") && table.contains("\tAll RD\tWRBW\tRDBW\tRPS\n"), "{table}");
        assert!(table.contains("\t1.0 GB\t1.0 MB\t0.0 MB\t9\n"), "{table}");
        assert!(raw.starts_with("1\t10\t4\t3\t2\t1\t12582912\t1073741824\t1048576\t0\t9\n"), "{raw}");
        assert_eq!(stat(Some(rates)).json().expect("JSON")["peer"]["requests_per_second"], 9);
    }
}
