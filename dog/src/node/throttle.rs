//! `dog node recovery get-throttle` and `set-throttle`

use qemu_proto::flags::RequestFlags;
use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;
use qemu_proto::stat::{THROTTLE_BYTES, Throttle};

use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::Target;
use crate::report::Report;

/// The interval is a signed number where the old tool keeps it.
const INTERVAL_MAX: u64 = i64::MAX as u64;

/// Tells it, where scripts look for it.
pub fn get(target: Target) -> Result<Report, Failure> {
    let mut request = Request::plain(Opcode::GetRecovery);
    request.data_length = THROTTLE_BYTES as u32;
    let refused = |reason| Failure::new(Exit::Refused, format!("Failed to get the recovery throttle: {reason}"));
    let (_, answer) = Sheep::connect(target)?.call(request, &[]).map_err(|trouble| trouble.or(refused))?;
    let Some(throttle) = Throttle::decode(&answer) else {
        return Err(Failure::system(format!("{target} answered {} bytes about its throttle", answer.len())));
    };
    eprintln!("max ({}), interval ({})", throttle.max, throttle.interval_ms);
    Ok(Report::silent())
}

/// Changes it.
pub fn set(typed: &args::Recovery, target: Target) -> Result<Report, Failure> {
    let (Some(max), Some(interval)) = (typed.max.as_deref(), typed.interval.as_deref()) else {
        return Err(Failure::usage("Say how fast: dog node recovery set-throttle MAX INTERVAL"));
    };
    let throttle = parse(max, interval)?;
    let mut request = Request::plain(Opcode::SetRecovery);
    request.flags = RequestFlags::WRITE;
    request.data_length = THROTTLE_BYTES as u32;
    let refused = |reason| Failure::new(Exit::Refused, format!("Failed to set the recovery throttle: {reason}"));
    Sheep::connect(target)?.call(request, &throttle.encode()).map_err(|trouble| trouble.or(refused))?;
    Ok(Report::silent())
}

fn parse(max: &str, interval: &str) -> Result<Throttle, Failure> {
    let invalid = |what: &str, word: &str| Failure::usage(format!("Invalid {what} ({word})"));
    let objects = max.parse::<u32>().map_err(|_| invalid("max", max))?;
    let milliseconds = interval.parse::<u64>().ok().filter(|ms| *ms <= INTERVAL_MAX);
    let milliseconds = milliseconds.ok_or_else(|| invalid("interval", interval))?;
    if (objects == 0) != (milliseconds == 0) {
        return Err(Failure::usage(format!("Invalid interval max ({max}), interval ({interval})")));
    }
    Ok(Throttle { max: objects, interval_ms: milliseconds, throttling: objects > 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_zero_or_neither() {
        assert_eq!(parse("0", "0"), Ok(Throttle::default()));
        let throttle = Throttle { max: u32::MAX, interval_ms: INTERVAL_MAX, throttling: true };
        assert_eq!(parse("4294967295", "9223372036854775807"), Ok(throttle));
        for (max, interval, text) in [
            ("x", "1", "Invalid max (x)"),
            ("-1", "0", "Invalid max (-1)"),
            ("4294967296", "1", "Invalid max (4294967296)"),
            ("1", "9223372036854775808", "Invalid interval (9223372036854775808)"),
            ("1", "0", "Invalid interval max (1), interval (0)"),
            ("0", "1", "Invalid interval max (0), interval (1)"),
        ] {
            let failure = parse(max, interval).expect_err(text);
            assert_eq!((failure.message.as_str(), failure.exit), (text, Exit::Usage));
        }
    }
}
