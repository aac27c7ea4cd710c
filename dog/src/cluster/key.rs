//! `dog cluster key`

use serde_json::json;

use crate::args::Key;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &Key, target: Target) -> Result<Report, Failure> {
    match typed.nested.as_deref() {
        Some("show") => {
            target.keeps_secrets("the cluster key")?;
            let key = requests::administer(&mut Sheep::connect(target)?, &json!({"do": "show-key"}))?;
            Ok(Report::text(format!("{key}\n")))
        }
        Some("rotate") => {
            let generation = requests::administer(&mut Sheep::connect(target)?, &json!({"do": "rotate-key"}))?;
            Ok(Report::text(format!(
                "the cluster key was replaced; this is its generation {generation}\n\
                 on every member it is in PATH/cluster/key, PATH being the directory that sheep was given\n\
                 copies of the old key file, and tokens that were not used yet, are void; members need nothing\n"
            )))
        }
        other => Err(Failure::nested(other, "show or rotate")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use crate::fake_sheep::FakeSheep;
    use crate::report::Style;
    use jiff::tz::TimeZone;
    use serde_json::Value;

    fn printed(fake: &FakeSheep, word: Option<&str>) -> Result<String, Failure> {
        let report = run(&Key { nested: word.map(str::to_owned) }, fake.target)?;
        let bytes = report.print(&Style { zone: TimeZone::UTC, is_terminal: false });
        Ok(String::from_utf8(bytes).expect("text"))
    }

    #[test]
    fn the_key_alone_is_shown_and_a_new_one_is_told_of() {
        let fake = FakeSheep::in_cluster(Value::Null);
        assert_eq!(printed(&fake, Some("show")), Ok("granted\n".to_owned()), "as the key file has it");
        let told = printed(&fake, Some("rotate")).expect("rotated");
        assert!(told.contains("generation granted\n") && told.contains("PATH/cluster/key"), "{told}");
        assert_eq!(fake.kept().wishes, [json!({"do": "show-key"}), json!({"do": "rotate-key"})]);
        assert_eq!(printed(&fake, None).expect_err("nothing to do").exit, Exit::Usage);
        assert_eq!(printed(&fake, Some("burn")).expect_err("no such thing").exit, Exit::Failure);
    }
}
