namespace MiniCpmNative.Engine.Data.Text;

/// <summary>Which answers of a ChatML conversation carry think blocks.</summary>
public enum Thoughts
{
    /// <summary>None: thoughts are text like any other (Qwen2).</summary>
    None,

    /// <summary>
    /// The last turn, with its thought or an empty one, and answers behind the last question that
    /// have a thought (Qwen3: V-4_5, o-4_5).
    /// </summary>
    BehindLastQuestion,

    /// <summary>The last turn alone.</summary>
    LastTurn,
}
