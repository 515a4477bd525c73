using System.Text.Json;
using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// LLaMA-Factory's dataset_info.json: for each name a file, whether its rows are alpaca or
/// sharegpt, and what the columns and roles are called there.
/// </summary>
internal static class DatasetInfo
{
    public const string FileName = "dataset_info.json";

    /// <summary>
    /// How the only entry for a file beside it reads it; null where there is none, or several, of
    /// which one may be named as dataset_info.json#NAME.
    /// </summary>
    /// <exception cref="InputException">dataset_info.json cannot be read.</exception>
    public static RowColumns? Of(string file)
    {
        string path = Path.Combine(Path.GetDirectoryName(file) ?? "", FileName);
        if (Path.GetFileName(file) == FileName || !File.Exists(path)) return null;
        var entries = JsonInput.ReadObject(path).Members().Where(entry =>
            entry.Value.Element.Member("file_name").Text() == Path.GetFileName(file)).ToList();
        return entries.Count == 1 ? Columns(entries[0].Name, entries[0].Value) : null;
    }

    /// <summary>The file of an entry, and how it is read.</summary>
    /// <exception cref="InputException">There is no such entry, or it names no file.</exception>
    public static (string File, RowColumns Columns) Entry(string path, string name)
    {
        var info = JsonInput.ReadObject(path);
        if (info.Find(name) is not { } entry)
            throw new InputException($"{path}: has no data set {Messages.Quote(name)}, only "
                + Messages.List([.. info.Members().Select(member => member.Name)]));
        if (entry.Find("file_name") is not { } file)
            throw new InputException($"{path}: data set {Messages.Quote(name)} has no file_name: "
                + "only data sets in files are read");
        return (Path.Combine(Path.GetDirectoryName(path) ?? "", file.Text()), Columns(name, entry));
    }

    private static RowColumns Columns(string name, JsonValue entry)
    {
        string formatting = entry.Find("formatting")?.Text() ?? "alpaca";
        if (formatting is not ("alpaca" or "sharegpt" or "openai"))
            throw entry.Expected("an entry whose formatting is alpaca, sharegpt or openai");
        if (entry.Find("ranking") is { } ranking && ranking.Bool())
            throw entry.Error("has ranking, pairs of answers of which one is preferred; they are "
                + "not used here");
        // A column or tag that is not named, where some are, is none.
        JsonValue? columns = entry.Find("columns"), tags = entry.Find("tags");
        string? Column(string key, string? otherwise) =>
            columns is { } given ? given.Find(key)?.Text() : otherwise;
        string? Tag(string key, string otherwise) =>
            tags is { } given ? given.Find(key)?.Text() : otherwise;
        bool turns = formatting != "alpaca";
        var roles = new Dictionary<string, string>();
        foreach (var (key, plain, role) in s_roles)
            if (Tag(key, plain) is { } said) roles[said] = role;
        return new RowColumns($"LLaMA-Factory's data set {Messages.Quote(name)} of {FileName}")
        {
            Turns = turns ? Column("messages", "conversations") ?? "conversations" : null,
            Role = Tag("role_tag", "from") ?? "from",
            Content = Tag("content_tag", "value") ?? "value",
            Roles = roles,
            Pictures = Column("images", null) is { } images ? [images] : [],
            Videos = Column("videos", null) is { } videos ? [videos] : [],
            System = Column("system", null) is { } system ? [system] : [],
            Tools = Column("tools", null) is { } tools ? [tools] : [],
            Question = turns ? null : Column("prompt", "instruction") ?? "instruction",
            Input = turns ? null : Column("query", "input"),
            Answer = turns ? null : Column("response", "output") ?? "output",
            History = turns ? null : Column("history", null),
        };
    }

    private static readonly (string Tag, string Plain, string Role)[] s_roles =
    [
        ("user_tag", "human", "user"), ("assistant_tag", "gpt", "assistant"),
        ("system_tag", "system", "system"), ("observation_tag", "observation", "tool"),
        ("function_tag", "function_call", "call"),
    ];
}
