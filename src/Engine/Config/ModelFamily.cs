namespace MiniCpmNative.Engine.Config;

/// <summary>
/// Tells from config.json which member of the family a model is. Told apart are all that exist, so
/// that one that is not supported yet is refused by its name and never run as another.
/// </summary>
public static class ModelFamily
{
    public const string V26 = "MiniCPM-V-2_6";

    public static IReadOnlyList<string> Supported { get; } = [V26];

    /// <summary>
    /// The family's name, or "model type ... (architecture ...)" of a foreign model.
    /// </summary>
    public static string Detect(JsonValue config)
    {
        string type = config.Find("model_type")?.Text() ?? "";
        string architecture = config.Find("architectures")?.Items()
            .FirstOrDefault() is { IsText: true } first
            ? first.Text() : "";
        if (type == "minicpmv4_6"
            || architecture.StartsWith("MiniCPMV4_6", StringComparison.Ordinal))
            return "MiniCPM-V-4_6";
        string version = Version(config);
        if (type == "minicpmo" || architecture == "MiniCPMO")
            return Member("MiniCPM-o", version.Length > 0 ? version : GuessAudioVersion(config));
        if (type == "minicpmv" || architecture == "MiniCPMV")
            return Member("MiniCPM-V", version.Length > 0 ? version : GuessVersion(config));
        return $"model type {Messages.Quote(type)} (architecture {Messages.Quote(architecture)})";
    }

    /// <exception cref="InputException">
    /// The model is not one of <see cref="Supported"/>.
    /// </exception>
    public static string Require(JsonValue config)
    {
        string family = Detect(config);
        return Supported.Contains(family) ? family : throw new InputException(
            $"{config.File}: {family} is not supported yet; supported: {string.Join(", ", Supported)}");
    }

    // Files write it as number (4.0) or as text ("2.5").
    private static string Version(JsonValue config)
    {
        if (config.Find("version") is not { } version) return "";
        string text = version.IsText ? version.Text() : version.Number().ToString(
            "0.0##", System.Globalization.CultureInfo.InvariantCulture);
        return Messages.OneLine(text);
    }

    // Version 2 has no version key and a timm tower;
    // later classes without one are told by their tower.
    private static string GuessVersion(JsonValue config)
    {
        string? tower = config.Find("vision_config")?.Find("model_type")?.Text();
        if (config.Find("vision_encoder") is not null || config.Find("scale_emb") is not null)
            return "2.0";
        return tower == "idefics2" ? "2.5" : "2.6";
    }

    // The two differ in how many audio frames are pooled.
    private static string GuessAudioVersion(JsonValue config) =>
        config.Find("audio_pool_step") is { IsNumber: true } step && step.Number() == 5
            ? "4.5" : "2.6";

    private static string Member(string line, string version) => (line, version) switch
    {
        ("MiniCPM-V", "2.5") => "MiniCPM-Llama3-V-2_5",
        _ when version.EndsWith(".0", StringComparison.Ordinal) => $"{line}-{version[..^2]}",
        _ => $"{line}-{version.Replace('.', '_')}",
    };
}
