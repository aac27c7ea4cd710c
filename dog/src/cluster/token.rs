//! `dog cluster token`

use serde_json::json;

use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(target: Target) -> Result<Report, Failure> {
    target.keeps_secrets("a token")?;
    let token = requests::administer(&mut Sheep::connect(target)?, &json!({"do": "token"}))?;
    Ok(Report::text(format!("sheep /data --join {token}\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_sheep::FakeSheep;
    use crate::report::Style;
    use jiff::tz::TimeZone;
    use serde_json::Value;

    #[test]
    fn a_token_is_one_line_to_be_typed() {
        let fake = FakeSheep::in_cluster(Value::Null);
        let report = run(fake.target).expect("a token");
        let printed = report.print(&Style { zone: TimeZone::UTC, is_terminal: false });
        assert_eq!(printed, b"sheep /data --join granted\n");
        assert_eq!(fake.kept().wishes, [json!({"do": "token"})]);
    }
}
