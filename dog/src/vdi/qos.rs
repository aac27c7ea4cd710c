//! `dog vdi qos`

use serde_json::{Value, json};

use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Target, as_text};
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &args::Qos, target: Target) -> Result<Report, Failure> {
    let name = as_text(meaning::vdi_name(&typed.vdi)?)?;
    let bytes = typed.bps.as_deref().map(meaning::size).transpose()?;
    let mut sheep = Sheep::connect(target)?;
    let failed = |failure: Failure| failure.about(&format!("Failed to limit VDI {name}"));
    let before = requests::volume_limits(&mut sheep)?.get(name).cloned().unwrap_or_default();
    if typed.iops.is_none() && bytes.is_none() && typed.burst.is_none() {
        return Ok(Report::text(if typed.json { format!("{before}\n") } else { shown(&before) }));
    }
    let number = |field: &str| before.get(field).and_then(Value::as_u64).unwrap_or(0);
    let wish = json!({
        "do": "limit-volume",
        "name": name,
        "operations_per_second": typed.iops.unwrap_or_else(|| number("operations_per_second")),
        "bytes_per_second": bytes.unwrap_or_else(|| number("bytes_per_second")),
        "burst_seconds": typed.burst.map_or_else(|| number("burst_seconds"), u64::from),
    });
    requests::administer(&mut sheep, &wish).map_err(failed)?;
    Ok(Report::silent())
}

fn shown(limits: &Value) -> String {
    let number = |field: &str| limits.get(field).and_then(Value::as_u64).unwrap_or(0);
    let limit = |value: u64| if value == 0 { "no limit".to_owned() } else { value.to_string() };
    format!(
        "Operations per second: {}\nBytes per second: {}\nBurst: {} seconds\n",
        limit(number("operations_per_second")),
        limit(number("bytes_per_second")),
        number("burst_seconds")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_shown_with_those_that_there_are_not() {
        let limits = json!({"operations_per_second": 5, "bytes_per_second": 0, "burst_seconds": 2});
        assert_eq!(shown(&limits), "Operations per second: 5\nBytes per second: no limit\nBurst: 2 seconds\n");
        assert_eq!(
            shown(&Value::Null),
            "Operations per second: no limit\nBytes per second: no limit\nBurst: 0 seconds\n"
        );
    }
}
