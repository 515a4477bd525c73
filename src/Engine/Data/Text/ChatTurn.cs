namespace MiniCpmNative.Engine.Data.Text;

/// <summary>
/// What one side says: role user, assistant or system; or tool, a function's result.
/// </summary>
/// <param name="Thought">What an answer thought first, where its content does not hold it.</param>
/// <param name="Calls">Functions that an answer calls.</param>
public sealed record ChatTurn(
    string Role, string Content, string? Thought = null, IReadOnlyList<ToolCall>? Calls = null)
{
    /// <summary>Whether an answer is learned; null where nothing was said, which means
    /// yes.</summary>
    public bool? Trained { get; init; }

    /// <summary>
    /// Functions that answers may call, on a system turn, whose content may be empty then: each as
    /// JSON as templates write it.
    /// </summary>
    public IReadOnlyList<string>? Tools { get; init; }

    /// <summary>Whether it is about functions, which not every format has.</summary>
    internal bool HasFunctions =>
        Role == "tool" || Calls is { Count: > 0 } || Tools is { Count: > 0 };

    /// <summary>All texts of it, of which only the content may show pictures.</summary>
    internal IEnumerable<string> Texts => [Content, .. Tools ?? [],
        .. (Calls ?? []).SelectMany(call => (string[])[call.Name, call.Arguments])];
}

/// <summary>
/// A conversation in tokens: Ids[T], and Answer[t] where token t is what the model is to say.
/// </summary>
public readonly record struct EncodedChat(int[] Ids, bool[] Answer);
