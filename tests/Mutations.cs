using System.Text;
using System.Text.Json.Nodes;

namespace MiniCpmNative.Tests;

/// <summary>Damaged variants of a good file, reproducible by seed.</summary>
internal sealed class Mutations(int seed)
{
    private static readonly string[] s_values =
    [
        "null", "true", "false", "0", "-1", "1", "2.5", "-0", "1e999", "1e-999",
        "9223372036854775807",
        "-9223372036854775808", "18446744073709551616", "1152921504606846976", "2147483647",
        "2147483648", "\"\"",
        "\"\\u0000\"", "\"\\ud800\"", "\"../../x\"", "\"F32\"", "[]", "{}", "[[[[]]]]",
        "{\"a\":{\"a\":1}}",
        "[0]", "[0,0]", "[4,2]", "[4611686018427387904,4]", "[1,2,3,4,5,6]", "\"(((\"",
        "\"(.*)*x\"", "[\"q_proj\"]",
        "\"NaN\"", "99999999999999999999999999999999999999", "\"\\n\\u001b[31m\"", "14", "448",
        "1000000",
    ];

    private readonly Random _random = new(seed);

    /// <summary>One to three random edits of bytes: flips, cuts, copies, foreign bytes.</summary>
    public byte[] Bytes(byte[] good)
    {
        List<byte> bytes = [.. good];
        for (int edits = _random.Next(1, 4); edits > 0; edits--)
        {
            int at = _random.Next(bytes.Count + 1),
                length = Math.Min(_random.Next(1, 20), bytes.Count - at);
            switch (_random.Next(6))
            {
                case 0 when at < bytes.Count: bytes[at] ^= (byte)(1 << _random.Next(8)); break;
                case 1: bytes.RemoveRange(at, length); break;
                case 2: bytes.InsertRange(at, bytes.GetRange(at, length)); break;
                case 3: bytes.Insert(at, (byte)_random.Next(256)); break;
                case 4:
                    bytes.RemoveRange(at,
                    _random.Next(8) == 0 ? bytes.Count - at : length); break;
                default: bytes.InsertRange(at, Encoding.UTF8.GetBytes(Value())); break;
            }
        }

        return [.. bytes];
    }

    /// <summary>
    /// One to three random edits of the tree: values replaced, removed, moved, added.
    /// </summary>
    public string Json(string good)
    {
        JsonNode root = JsonNode.Parse(good)!;
        for (int edits = _random.Next(1, 4); edits > 0; edits--)
        {
            JsonNode target = Pick(root);
            if (target is JsonObject { Count: > 0 } members)
            {
                string key = members.ElementAt(_random.Next(members.Count)).Key;
                string other = members.ElementAt(_random.Next(members.Count)).Key;
                switch (_random.Next(5))
                {
                    case 0: members.Remove(key); break;
                    case 1: members[other] = members[key]?.DeepClone(); break;
                    case 2:
                        members[key + "\n" + _random.Next(9)] =
                        members[key]?.DeepClone(); break;
                    default: members[key] = Node(); break;
                }
            }
            else if (target is JsonArray items)
            {
                if (items.Count > 0 && _random.Next(2) == 0)
                    items[_random.Next(items.Count)] = Node();
                else items.Insert(_random.Next(items.Count + 1), Node());
            }
        }

        return root.ToJsonString();
    }

    private string Value() => s_values[_random.Next(s_values.Length)];

    // A tree cannot hold half a surrogate pair; byte edits can.
    private JsonNode? Node()
    {
        string value = Value();
        return JsonNode.Parse(value.Contains("\\ud", StringComparison.Ordinal) ? "[]" : value);
    }

    private JsonNode Pick(JsonNode root)
    {
        JsonNode node = root;
        while (true)
        {
            JsonNode?[] inner = node switch
            {
                JsonObject members => [.. members.Select(m => m.Value)],
                JsonArray items => [.. items],
                _ => [],
            };
            JsonNode[] deeper = [.. inner.Where(n => n is JsonObject or JsonArray).Select(n => n!)];
            if (deeper.Length == 0 || _random.Next(3) == 0) return node;
            node = deeper[_random.Next(deeper.Length)];
        }
    }
}
