//! The texts of `dog node log level`.

use qemu_proto::stat::LOG_LEVELS;
use serde_json::{Value, json};

use super::text::put;
use crate::node::log::Levels;
use crate::report::{Show, Style};

impl Show for Levels {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        match self {
            Levels::Of(name, number) => put(out, format_args!("{name} ({number})\n")),
            Levels::All => {
                for (number, name) in LOG_LEVELS.iter().enumerate() {
                    put(out, format_args!("{name}\t({number})\n"));
                }
            }
        }
    }

    fn json(&self) -> Option<Value> {
        let level = |name: &str, number: usize| json!({"level": name, "number": number});
        Some(match self {
            Levels::Of(name, number) => level(name, *number),
            Levels::All => LOG_LEVELS.iter().enumerate().map(|(number, name)| level(name, number)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    #[test]
    fn levels_have_names_and_numbers() {
        let shown = |levels: &Levels| {
            let mut out = Vec::new();
            levels.table(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut out);
            String::from_utf8(out).expect("text")
        };
        assert_eq!(shown(&Levels::Of("info", 6)), "info (6)\n");
        assert!(shown(&Levels::All).starts_with("emerg\t(0)\nalert\t(1)\n"));
        assert_eq!(Levels::All.json().expect("JSON")[7], json!({"level": "debug", "number": 7}));
    }
}
