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
}

/// <summary>
/// A conversation in tokens: Ids[T], and Answer[t] where token t is what the model is to say.
/// </summary>
public readonly record struct EncodedChat(int[] Ids, bool[] Answer);
